"""The learning rate of each schedule, at its ends, in its middle and after the warm-up, worked out by hand."""

import math
from itertools import pairwise
from typing import Any

import pytest

from tpformer.train.schedule import OptimizerConfig, learning_rate

STEPS = 110
WARM = {step: (step + 1) / 10 for step in (0, 4, 9)}  # ten steps of warm-up: 1/10, 5/10 and the peak
COSINE_45 = (1 - math.sqrt(0.5)) / 2  # (1 - cos 45°) / 2

# schedule -> step -> rate as a part of the peak; decaying ones end at a quarter of it
BY_HAND: dict[str, dict[int, float]] = {
    "constant": WARM | {10: 1.0, 60: 1.0, 109: 1.0},
    # progress is (step - 10) / 100 of the way from 1 to 1/4
    "linear": WARM | {10: 1.0, 35: 1 - 0.75 * 0.25, 60: 0.625, 109: 1 - 0.75 * 0.99, 110: 0.25},
    "cosine": WARM | {10: 1.0, 35: 1 - 0.75 * COSINE_45, 60: 0.625, 85: 0.25 + 0.75 * COSINE_45, 110: 0.25},
    # the last 20 % of 110 steps are 22: constant up to step 88
    "wsd": WARM | {10: 1.0, 60: 1.0, 88: 1.0, 99: 0.625, 109: 1 - 0.75 * 21 / 22, 110: 0.25},
    # the peak at the tenth step, then the root of 10 over the number of the step
    "noam": WARM | {39: 0.5, 89: 1 / 3, 109: math.sqrt(10 / 110)},
}


def config(**options: Any) -> OptimizerConfig:
    """Ten steps of warm-up to 0.5, down to a quarter."""
    return OptimizerConfig(**({"lr": 0.5, "warmup_steps": 10, "min_lr_ratio": 0.25} | options))


@pytest.mark.parametrize("schedule", BY_HAND)
def test_rates_are_those_worked_out_by_hand(schedule: Any) -> None:
    for step, part in BY_HAND[schedule].items():
        assert learning_rate(step, STEPS, config(schedule=schedule)) == pytest.approx(0.5 * part, rel=1e-14), step


@pytest.mark.parametrize("schedule", BY_HAND)
def test_rates_rise_to_the_peak_never_rise_again_and_never_jump(schedule: Any) -> None:
    rates = [learning_rate(step, STEPS, config(schedule=schedule)) for step in range(STEPS)]
    assert rates.index(max(rates)) == 9
    assert max(rates) == 0.5
    changes = [b - a for a, b in pairwise(rates)]
    assert all(change == pytest.approx(0.05) for change in changes[:9])
    assert all(-0.05 < change <= 0 for change in changes[9:])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_without_warm_up_the_first_step_is_at_the_peak(schedule: Any) -> None:
    assert learning_rate(0, STEPS, config(schedule=schedule, warmup_steps=0)) == 0.5
    assert learning_rate(0, 1, config(schedule=schedule, warmup_steps=0)) == 0.5


def test_noam_without_warm_up_falls_from_the_first_step() -> None:
    noam = config(schedule="noam", warmup_steps=0)
    assert [learning_rate(step, STEPS, noam) for step in (0, 3, 99)] == pytest.approx([0.5, 0.25, 0.05], rel=1e-14)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_a_warm_up_longer_than_the_run_is_all_there_is(schedule: Any) -> None:
    rates = [learning_rate(step, 5, config(schedule=schedule)) for step in range(5)]
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25], rel=1e-14)


def test_wsd_decays_over_the_fraction_it_is_told_but_not_in_the_warm_up() -> None:
    half = config(schedule="wsd", decay_fraction=0.5)
    assert learning_rate(55, STEPS, half) == 0.5
    assert learning_rate(66, STEPS, half) == pytest.approx(0.5 * (1 - 0.75 * 11 / 55), rel=1e-14)
    whole = config(schedule="wsd", decay_fraction=1.0)
    assert [learning_rate(step, STEPS, whole) for step in (9, 10)] == [0.5, 0.5]
    assert learning_rate(60, STEPS, whole) == pytest.approx(0.5 * 0.625, rel=1e-14)
    none = config(schedule="wsd", decay_fraction=0.0)
    assert learning_rate(STEPS - 1, STEPS, none) == 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("lr", 0.0), ("lr", -1.0), ("lr", math.nan), ("schedule", "sine"), ("warmup_steps", -1)),
        *(("min_lr_ratio", 1.5), ("decay_fraction", -0.1), ("betas", (0.9, 1.0)), ("eps", 0.0)),
        *(("weight_decay", -0.1), ("clip_norm", -1.0)),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field} \(.*\) is out of range"):
        OptimizerConfig(**{field: value})
