"""What a run's first steps show, whatever the run is; and that a run which cannot be watched goes on."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.distributed import Ranks
from tests.train.runs import config, corpus, records, run_parallel
from tpformer import Mesh, ParallelConfig
from tpformer.parallel.compile import compile_blocks
from tpformer.train import build as building
from tpformer.train.config import RunConfig, TrainConfig
from tpformer.train.trainer import Trainer


def test_collectives_memory_and_timeline_of_the_first_three_steps(tmp_path: Path) -> None:
    """And of no other: the fourth is not watched."""
    trainer = Trainer(config(steps=4, timeline=True), Mesh(), corpus(), tmp_path)
    seen = trainer.steps
    found = []
    for _ in range(4):
        trainer._train_step()
        found.append((seen.trace is not None, bool(seen.memory), bool(seen.timeline)))
    assert found == [(True, False, False), (True, True, False), (True, True, True), (True, True, True)]
    assert seen.memory.startswith("rank  parameters")
    assert "p = 1, m = 4" in seen.timeline
    assert (tmp_path / "timeline.png").stat().st_size > 0


def run_compiled(config: TrainConfig[Any], directory: Path) -> None:
    """On a rank: train, without inductor, which takes long."""
    with patch.object(building, "compile_blocks", partial(compile_blocks, backend="eager")):
        run_parallel(config, directory)
    torch._dynamo.reset()


def test_a_compiled_run_on_a_cpu_goes_on_after_the_step_that_would_be_measured(tmp_path: Path, ranks: Ranks) -> None:
    """Operators are followed by a dispatch mode, under which torch.compile raises. The losses are those of eager."""
    ranks(run_parallel, 1, config(steps=3), tmp_path / "eager")
    ranks(run_compiled, 1, replace(config(steps=3), parallel=ParallelConfig(compile=True)), tmp_path / "compiled")
    for found, expected in zip(records(tmp_path / "compiled"), records(tmp_path / "eager"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("name", "steps"), [("memory_snapshot", 2), ("timeline", 3)])
def test_a_run_too_short_for_what_it_is_to_show_is_refused(name: str, steps: int) -> None:
    RunConfig(steps=steps, **{name: True})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"{name} is of a run's .* steps \({steps - 1}\) must be at least {steps}"):
        RunConfig(steps=steps - 1, **{name: True})  # type: ignore[arg-type]
