"""The step's time: bubbles against the schedules' own orders, terms against sums by hand, and what must be slower."""

from dataclasses import replace
from typing import Any

import pytest

from tpformer import ParallelConfig
from tpformer.parallel.bubble import schedule_order, simulate, theoretical_bubble
from tpformer.planner.candidate import Candidate
from tpformer.planner.cost import Kind, Machine, StepTime, Term, bubble_seconds, mfu, rank_times
from tpformer.planner.hardware import device, link
from tpformer.planner.known_models import known_model
from tpformer.planner.search import planned

MACHINE = Machine(device("h100-sxm"), link("ib-400"))
SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 4)]
SCHEDULES += [("interleaved_zero_bubble", 2), ("interleaved_zero_bubble", 4), ("zbv", 2), ("dualpipev", 2)]


def candidate(micro_batches: int = 8, model: str = "llama-8b", **options: Any) -> Candidate:
    dp = options.get("dp", 1)
    fields: dict[str, Any] = {"dp": 1, "precision": "bf16"} | options
    parallel = ParallelConfig(**fields)
    return Candidate(known_model(model), parallel, 4096, micro_batches * dp, 1)


@pytest.mark.parametrize(("schedule", "stages"), SCHEDULES)
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_the_bubble_is_that_of_the_schedules_order(schedule: Any, stages: int, pp: int, rounds: int) -> None:
    """With stages alike and a backward of twice a forward, as `theoretical_bubble` runs it."""
    if schedule == "dualpipev" and rounds == 1:
        rounds = 8  # it needs 2 pp micro-batches
    c = candidate(pp * rounds, pp=pp, pp_schedule=schedule, stages_per_rank=stages if stages > 1 else 0)
    idle = bubble_seconds(c, 1.0, 2.0)
    assert idle / (3 * c.micro_batches + idle) == pytest.approx(
        theoretical_bubble(schedule, pp, c.micro_batches, c.parallel.stages_per_rank)
    )


def test_the_bubble_of_zero_bubble_schedules_with_recomputation() -> None:
    """The inputs' gradients take a forward more, the weights' do not: as the order runs with these costs."""
    c = candidate(16, pp=4, pp_schedule="interleaved_zero_bubble", stages_per_rank=2)
    cost = {"forward": 0.5, "input gradient": 1.0, "weight gradient": 0.5}  # of each of two stages
    spans = simulate(schedule_order("interleaved_zero_bubble", 4, 16, 2), lambda kind, _: cost[kind])
    idle = max(span.end for rank in spans for span in rank) - 16 * 2 * 2.0
    assert bubble_seconds(c, 1.0, 2.0, 1.0) == pytest.approx(idle, rel=0.25)
    assert bubble_seconds(c, 1.0, 2.0, 0.0) < 0.75 * idle  # without it


def test_a_recomputed_mlp_costs_no_attention() -> None:
    """However long the sequence."""
    seconds = []
    for length in (1024, 65536):
        found = {}
        for modules in (("mlp",), ("attention",), ("attention.core",), ()):
            options: dict[str, Any] = {"recompute": "selective", "recompute_modules": modules} if modules else {}
            parallel = ParallelConfig(dp=1, precision="bf16", **(options or {"recompute": "full"}))
            c = Candidate(known_model("llama-8b"), parallel, length, 1, 1)
            found[modules] = rank_times(c, MACHINE)[0].recompute
        assert found["mlp",] + found["attention",] == pytest.approx(found[()])
        assert found["attention.core",] < found["attention",]
        seconds.append(found["mlp",] / length)
    assert seconds[1] == pytest.approx(seconds[0], rel=0.2)


def test_a_step_is_the_sum_of_its_terms() -> None:
    found = planned(candidate(tp=2, pp=2, dp=2), MACHINE).time
    kinds: tuple[Kind, ...] = ("compute", "recompute", "bubble", "tp", "pp", "dp", "optimizer")
    assert found.total == pytest.approx(sum(found.of(kind) for kind in kinds))
    assert min(found.of(kind) for kind in ("compute", "bubble", "tp", "pp", "optimizer")) > 0


def test_a_term_is_the_product_of_its_factors() -> None:
    time = StepTime((Term("tp", "", (("calls", 3.0), ("seconds", 0.5))), Term("dp", "", (("seconds", 2.0),))))
    assert (time.total, time.of("tp"), time.of("pp")) == (3.5, 1.5, 0.0)


def test_compute_is_flops_over_the_rate_and_bytes_over_the_bandwidth() -> None:
    """Forward and backward of a rank take longer than at the matmul rate alone, and less than twice that."""
    c = candidate()
    (time,) = rank_times(c, MACHINE)
    least = c.model.flops_per_token(4096) * 4096 / (MACHINE.device.peak("bf16") * MACHINE.device.matmul_efficiency)
    assert least < time.forward + time.backward < 2 * least


def ends_alone() -> float:
    """Forward of the embedding and the head: what a model twice as deep has not twice."""
    model, parallel = known_model("llama-8b"), ParallelConfig(dp=1, precision="bf16")
    shallow, deep = (
        rank_times(Candidate(replace(model, num_layers=layers), parallel, 4096, 8, 1), MACHINE) for layers in (32, 64)
    )
    return 2 * shallow[0].forward - deep[0].forward


def test_recomputation_costs_a_forward_of_the_blocks() -> None:
    none, full, every = (
        rank_times(candidate(**options), MACHINE)[0]
        for options in ({}, {"recompute": "full"}, {"recompute": "full", "recompute_every": 2})
    )
    assert none.recompute == 0
    assert full.recompute == pytest.approx(none.forward - ends_alone())  # the embedding and the head are not
    assert every.recompute == pytest.approx(full.recompute / 2)


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ({"tp": 8}, {"tp": 4, "dp": 2}),  # more all-reduces of the same size
        ({"tp": 16}, {"tp": 8, "dp": 2}),  # they leave the node
        ({"pp": 4, "micro_batches": 4}, {"pp": 4, "micro_batches": 16}),
        ({"pp": 4, "pp_schedule": "1f1b"}, {"pp": 4, "pp_schedule": "zbv"}),
        ({"recompute": "full"}, {}),
    ],
    ids=str,
)
def test_what_must_cost_more_does(worse: dict[str, Any], better: dict[str, Any]) -> None:
    """By utilisation, for the number of devices differs."""
    found = [planned(candidate(**{"model": "llama2-70b"} | options), MACHINE) for options in (worse, better)]
    assert found[0].mfu < found[1].mfu


def test_utilisation_by_hand() -> None:
    c = candidate(tp=2)
    flops = known_model("llama-8b").flops_per_token(4096) * 8 * 4096
    assert mfu(c, 2.0, MACHINE.device) == pytest.approx(flops / 2.0 / (2 * 989e12))


def test_a_precision_that_the_device_has_not_is_an_error() -> None:
    old = Machine(device("v100-sxm2-32"), link("ib-100"))
    with pytest.raises(ValueError, match="v100-sxm2-32 has no bf16 matmul rate, only fp32 and fp16"):
        planned(candidate(), old)
