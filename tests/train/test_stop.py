"""SIGTERM to any rank: every rank saves after the same step and stops, and the run goes on as if nothing had been."""

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import Ranks
from tests.proofs.cases import Layout, build, gpt
from tests.train import runs
from tests.train.test_optimizer import LOSS, some_gradients
from tpformer import Axis, Mesh
from tpformer.parallel_config import ParallelConfig
from tpformer.trace import trace_communication
from tpformer.train.config import TrainConfig
from tpformer.train.optimizer import Optimizer
from tpformer.train.schedule import OptimizerConfig
from tpformer.train.stop import Stopped, StopSignal
from tpformer.train.trainer import Trainer


class TerminatedTrainer(Trainer):
    """This process gets a signal while it takes its step number `at`."""

    at, number = 0, signal.SIGTERM

    def _train_step(self) -> Any:
        if self.step + 1 == self.at:
            os.kill(os.getpid(), self.number)
        return super()._train_step()


def run(config: TrainConfig[Any], directory: Path, at: dict[int, int], number: int = signal.SIGTERM) -> tuple[str, int]:
    """On a rank: train; at: the step in which a rank gets the signal. How it stopped, and after which step."""
    directory.mkdir(exist_ok=True)
    mesh = Mesh.of(config.parallel, "cpu")
    with StopSignal() as stop:
        trainer = TerminatedTrainer(config, mesh, runs.corpus(), directory, stop)
        trainer.at, trainer.number = at.get(mesh.world.rank, 0), signal.Signals(number)
        try:
            trainer.run()
        except Stopped as reason:
            return str(reason), trainer.step
        return "", trainer.step


def config(layout: dict[str, Any], **options: Any) -> TrainConfig[Any]:
    """Six steps, evaluated and saved at odd moments."""
    return replace(runs.config(eval_interval=4, checkpoint_interval=5, **options), parallel=ParallelConfig(**layout))


@pytest.mark.parametrize("layout", [{"tp": 2}, {"dp": 2, "dp_mode": "fsdp"}, {"pp": 2}], ids=str)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_stop_after_the_step_in_which_one_was_told(
    layout: dict[str, Any], number: int, tmp_path: Path, ranks: Ranks
) -> None:
    said = "stopped by a signal after step 3, which is saved: go on with --resume"
    assert ranks(run, 2, config(layout), tmp_path / "run", {1: 3}, number) == [(said, 3)] * 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000003"]
    if number == signal.SIGTERM:
        ranks(run, 2, config(layout), tmp_path / "peace", {})
        assert ranks(run, 2, config(layout, resume=True), tmp_path / "run", {}) == [("", 6)] * 2
        assert runs.records(tmp_path / "run") == runs.records(tmp_path / "peace")


def test_signals_at_different_steps_are_one_stop(tmp_path: Path, ranks: Ranks) -> None:
    """The first one counts; a later one, to another rank, would have come too late."""
    assert [step for _, step in ranks(run, 2, config({"tp": 2}), tmp_path / "run", {0: 4, 1: 2})] == [2, 2]


def test_told_in_the_last_step_it_ends_as_ever(tmp_path: Path, ranks: Ranks) -> None:
    assert ranks(run, 2, config({"tp": 2}), tmp_path / "run", {0: 6}) == [("", 6)] * 2


def told(layout: Layout, alone: bool) -> tuple[bool, int]:
    """On a rank: whether it heard of the last rank's stop, and the collectives of the optimizer's step."""
    mesh = layout.mesh()
    model = build(gpt(), mesh)
    optimizer = Optimizer(model, mesh, OptimizerConfig())
    if alone:
        optimizer.mesh = Mesh(world=Axis("world"))
    with trace_communication() as trace:
        last = mesh.world.rank == mesh.world.size - 1
        outcome = optimizer.step(some_gradients(model, 0), 0.1, LOSS, stop=last)
    return outcome.stop, len(trace.calls)


def test_it_rides_on_the_norm_s_all_reduce(ranks: Ranks) -> None:
    """And the control: where each rank decides for itself, only one stops."""
    assert ranks(told, 4, Layout(2, 2), False) == [(True, 1)] * 4
    assert ranks(told, 4, Layout(2, 2), True) == [(False, 0)] * 3 + [(True, 0)]


def test_handlers_are_put_back_and_other_threads_set_none() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    entered: list[StopSignal] = []
    thread = threading.Thread(target=lambda: entered.append(StopSignal().__enter__()))
    thread.start()
    thread.join()
    assert len(entered) == 1
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_without_a_signal_nothing_asks() -> None:
    outcome = Optimizer(model := torch.nn.Linear(2, 2), Mesh(), OptimizerConfig()).step(
        {name: torch.ones_like(p) for name, p in model.named_parameters()}, 0.1, LOSS
    )
    assert outcome.stop is False
