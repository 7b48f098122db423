"""A run that goes on at another layout, pipelines and shared-out parameters among them: the same losses, to rounding,
and the same data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import Ranks
from tests.train.runs import Record, config, records, resumed, run_parallel
from tpformer import ParallelConfig

LAYOUTS = {
    "pp 2": ParallelConfig(pp=2),
    "pp 2 x tp 2, sequence parallel": ParallelConfig(tp=2, pp=2, sequence_parallel=True),
    "pp 2 x dp 2, zbv": ParallelConfig(pp=2, dp=2, pp_schedule="zbv"),
    "pp 4, gpipe": ParallelConfig(pp=4, pp_schedule="gpipe"),
    "fsdp 2 x tp 2": ParallelConfig(dp=2, tp=2, dp_mode="fsdp"),
    "pp 2 x fsdp 2": ParallelConfig(pp=2, dp=2, dp_mode="fsdp"),
}


def settings(model: str, parallel: ParallelConfig) -> Any:
    """Six steps of four layers in four micro-batches."""
    base = config(model, micro_batch_size=2 if parallel.dp != 2 else 1)
    return replace(base, model=replace(base.model, num_layers=4), parallel=parallel)


@pytest.fixture(scope="module")
def alone(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    """The records of undisturbed runs on one process."""
    found = {}
    for model in ("llama", "gpt"):
        directory = tmp_path_factory.mktemp(model) / "run"
        ranks(run_parallel, 1, settings(model, ParallelConfig()), directory)
        found[model] = records(directory)
    return found


@pytest.mark.parametrize(("model", "first", "then"), [
    ("gpt", "pp 2", "pp 2 x tp 2, sequence parallel"),
    ("llama", "pp 2 x tp 2, sequence parallel", "pp 4, gpipe"),
    ("gpt", "pp 4, gpipe", "pp 2 x dp 2, zbv"),
    ("gpt", "fsdp 2 x tp 2", "pp 2 x tp 2, sequence parallel"),
    ("llama", "pp 2 x dp 2, zbv", "fsdp 2 x tp 2"),
    ("gpt", "pp 2 x fsdp 2", "pp 4, gpipe"),
])  # fmt: skip
def test_three_steps_here_and_three_there(
    model: str, first: str, then: str, alone: dict[str, list[Record]], tmp_path: Path, ranks: Ranks
) -> None:
    """Losses, norms and evaluations of six steps on one process; gpt's embeddings are tied."""
    directory = tmp_path / "run"
    sizes = {name: p.pp * p.tp * (p.dp or 1) for name, p in LAYOUTS.items()}
    ranks(run_parallel, sizes[first], settings(model, LAYOUTS[first]), directory, 3)
    seen = ranks(run_parallel, sizes[then], resumed(settings(model, LAYOUTS[then])), directory)
    assert {number for rank in seen for step in rank for number in step} == set(range(24, 48))
    found = records(directory)
    assert [r["step"] for r in found] == [r["step"] for r in alone[model]]
    for record, expected in zip(found, alone[model], strict=True):
        assert record == pytest.approx(expected, rel=2e-5)
