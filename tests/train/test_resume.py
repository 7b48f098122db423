"""A run that stopped and goes on is the run that never stopped: its losses bit for bit, its samples and its records."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoint.cases import sign_again
from tests.distributed import Ranks
from tests.proofs.cases import Layout
from tests.train.runs import Record, complaint, config, records, resumed, run
from tpformer.checkpoint.store import latest_checkpoint
from tpformer.train.config import TrainConfig

TP2 = Layout(2)


def straight(
    directory: Path, ranks: Ranks, settings: TrainConfig[Any], layout: Layout
) -> tuple[list[Record], list[list[list[int]]]]:
    """The records of an undisturbed run, and the samples that each rank saw in each step."""
    seen = ranks(run, layout.world_size, settings, layout, directory)
    return records(directory), seen


@pytest.fixture(scope="module")
def expected(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """The records of an undisturbed run of config() at tp 2."""
    return straight(tmp_path_factory.mktemp("tp2") / "run", ranks, config(), TP2)[0]


@pytest.fixture(scope="module")
def alone(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Record], list[list[int]]]:
    """The records of an undisturbed run of config() on one process, and its samples."""
    found, (seen,) = straight(tmp_path_factory.mktemp("tp1") / "run", ranks, config(), Layout(1))
    return found, seen


@pytest.mark.parametrize(
    ("model", "layout", "options"),
    [
        ("llama", TP2, {}),
        ("gpt", Layout(2, 2, True), {"micro_batch_size": 1}),
        ("llama", TP2, {"precision": "bf16"}),
        ("gpt", Layout(1), {"micro_batch_size": 3}),
    ],
    ids=str,
)
def test_three_steps_and_three_more_are_six(
    model: str, layout: Layout, options: dict[str, Any], tmp_path: Path, ranks: Ranks
) -> None:
    """With dropout, accumulation, a changing rate and evaluation: every record bit for bit."""
    settings = config(model, **options)
    expected, seen = straight(tmp_path / "straight", ranks, settings, layout)
    assert [r["step"] for r in expected if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in expected if "validation_loss" in r] == [2, 4, 6]
    assert len({r["loss"] for r in expected if "loss" in r}) == 6
    directory = tmp_path / "stopped"
    before = ranks(run, layout.world_size, settings, layout, directory, 3)
    assert latest_checkpoint(directory / "checkpoints") == directory / "checkpoints" / "step_00000003"
    after = ranks(run, layout.world_size, resumed(settings), layout, directory)
    assert records(directory) == expected
    assert [a + b for a, b in zip(before, after, strict=True)] == seen


def test_without_the_moments_the_losses_would_differ(expected: list[Record], tmp_path: Path, ranks: Ranks) -> None:
    """The control: a checkpoint whose exp_avg is zero goes on to other losses."""
    directory = tmp_path / "stopped"
    ranks(run, 2, config(), TP2, directory, 3)
    path = directory / "checkpoints" / "step_00000003"
    file = path / "optimizer" / "model.safetensors"
    save_file({n: t * 0 if n.startswith("exp_avg.") else t for n, t in load_file(file).items()}, file)
    sign_again(path)
    ranks(run, 2, resumed(config()), TP2, directory)
    same = [a == b for a, b in zip(records(directory), expected, strict=True) if "loss" in a]
    assert same == [True, True, True, True, False, False]  # the fourth loss is that of the weights as they were


def close(a: Record, b: Record) -> bool:
    """The same fields, and numbers to fp32's rounding after a few steps."""
    return a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], rel=1e-6) for key in a)


@pytest.mark.parametrize(
    ("first", "second"),
    [(TP2, Layout(1, 2)), (Layout(1, 2), TP2), (TP2, Layout(4, 1, True)), (Layout(2, 2), Layout(1))],
    ids=str,
)
def test_it_goes_on_at_another_layout(
    first: Layout, second: Layout, alone: tuple[list[Record], list[list[int]]], tmp_path: Path, ranks: Ranks
) -> None:
    """Within rounding, on the same samples: the two replicas together read what one read before."""
    expected, seen = alone
    directory = tmp_path / "stopped"
    before = ranks(run, first.world_size, config(), first, directory, 3)
    after = ranks(run, second.world_size, resumed(config()), second, directory)
    found = records(directory)
    assert len(found) == len(expected)
    assert all(close(a, b) for a, b in zip(found, expected, strict=True)), (found, expected)
    steps = [by_step(before, first.tp), by_step(after, second.tp)]
    assert steps[0] + steps[1] == seen


def by_step(seen: list[list[list[int]]], tp: int) -> list[list[int]]:
    """The samples of each step over all replicas, from each rank's; the tp ranks of a replica saw the same."""
    for rank, found in enumerate(seen):
        assert found == seen[rank // tp * tp]
    return [[number for part in parts for number in part] for parts in zip(*seen[::tp], strict=True)]


def test_lines_after_the_checkpoint_and_half_a_line_go(expected: list[Record], tmp_path: Path, ranks: Ranks) -> None:
    """Killed at step 5 while it wrote a line, resumed from step 3: each step once, as if nothing had been."""
    directory = tmp_path / "stopped"
    ranks(run, 2, config(), TP2, directory, 5)
    assert [r["step"] for r in records(directory) if "loss" in r] == [1, 2, 3, 4, 5]
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    ranks(run, 2, resumed(config()), TP2, directory)
    assert records(directory) == expected


def test_a_run_without_a_checkpoint_begins_again(expected: list[Record], tmp_path: Path, ranks: Ranks) -> None:
    directory = tmp_path / "stopped"
    ranks(run, 2, config(), TP2, directory, 2)
    assert not (directory / "checkpoints").exists()
    ranks(run, 2, resumed(config()), TP2, directory)
    assert records(directory) == expected


def test_a_finished_run_is_only_reported_again(tmp_path: Path, ranks: Ranks) -> None:
    """No step is taken, and no record comes twice."""
    directory = tmp_path / "run"
    ranks(run, 2, config(steps=4), TP2, directory)
    finished = records(directory)
    assert ranks(run, 2, resumed(config(steps=4)), TP2, directory) == [[], []]
    assert records(directory) == finished


def test_more_steps_can_be_asked_for(tmp_path: Path, ranks: Ranks) -> None:
    directory = tmp_path / "run"
    ranks(run, 2, config(steps=4), TP2, directory)
    assert ranks(run, 2, resumed(config(steps=6)), TP2, directory)[0] == [list(range(32, 40)), list(range(40, 48))]
    assert [r["step"] for r in records(directory) if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records(directory) if "validation_loss" in r] == [2, 4, 6]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch_size": 4}, "was made with batch_size 8, not 4: the order of the data would change$"),
        ({"seed": 5}, "was made with seed 0, not 5: the order of the data would change$"),
        ({"model": {"num_layers": 3}}, "was made with another model: num_layers 2, not 3$"),
        (
            {"model": {"rope_theta": 5e5, "norm_eps": 1e-6}},
            r"model: rope_theta 10000\.0, not 500000\.0, norm_eps 1e-05, not",
        ),
    ],
    ids=str,
)
def test_what_cannot_go_on_is_refused_by_name(changes: dict[str, Any], text: str, stopped: Path, ranks: Ranks) -> None:
    """On every rank, in one line, before anything is read; weights of the same shapes that mean something else too."""
    settings = resumed(config(), **{name: value for name, value in changes.items() if name != "model"})
    settings = replace(settings, model=replace(settings.model, **changes.get("model", {})))
    found = ranks(complaint, 2, settings, TP2, stopped)
    assert found[0] == found[1]
    assert re.search(rf"step_00000003 .*{text}", found[0]), found[0]
    assert "\n" not in found[0]


def test_what_does_not_change_the_weights_may_change(stopped: Path, ranks: Ranks) -> None:
    settings = resumed(config())
    settings = replace(settings, model=replace(settings.model, dropout=0.0, attention_dropout=0.0))
    assert ranks(complaint, 2, settings, TP2, stopped) == ["nothing was raised"] * 2


def test_a_damaged_checkpoint_is_refused_by_name(stopped: Path, tmp_path: Path, ranks: Ranks) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step_00000003" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    for text in ranks(complaint, 2, resumed(config()), TP2, tmp_path / "run"):
        assert re.search(r"model\.safetensors is damaged: the checksum of model\.norm\.weight\[0:32\] differs", text)


@pytest.fixture(scope="module")
def stopped(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after its third step."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    ranks(run, 2, config(), TP2, directory, 3)
    return directory


def test_old_checkpoints_go_as_new_ones_come(tmp_path: Path, ranks: Ranks) -> None:
    """All but the last two, and those of every third step."""
    ranks(run, 2, config(checkpoint_interval=1, keep_checkpoints=2, keep_every=3), TP2, tmp_path / "run")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000003", "step_00000005", "step_00000006"]


@pytest.mark.parametrize("background", [True, False])
def test_saving_leaves_the_run_as_it_is_and_is_reported(
    background: bool, expected: list[Record], tmp_path: Path, ranks: Ranks
) -> None:
    """Losses bit for bit those of other intervals, at once and in the background; a line for each checkpoint."""
    directory = tmp_path / "run"
    ranks(run, 2, config(checkpoint_interval=1, async_checkpoint=background), TP2, directory)
    assert records(directory) == expected
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    saved = [line for line in lines if "checkpoint_seconds" in line]
    assert [line["checkpoint_step"] for line in saved] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    for line in saved:
        assert 0 < line["checkpoint_stall_seconds"] <= line["checkpoint_seconds"]
        assert (line["checkpoint_stall_seconds"] < line["checkpoint_seconds"]) is background
