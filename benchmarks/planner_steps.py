"""Training steps of many layouts on the ranks that torchrun started, timed in turn, to hold the planner's against.

Run by benchmarks.planner. A step is the trainer's: forward, backward, the gradients' sums and the optimizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import harness
from benchmarks.planner_layouts import BATCH, MODEL, SEQ_LEN, Case, cases
from tpformer import Mesh
from tpformer.train.build import build
from tpformer.train.config import DataConfig, RunConfig, TrainConfig
from tpformer.train.step import StepOptions, train_step


def step_of(case: Case) -> Callable[[], float]:
    """A layout's training step, on a rank; it gives the loss."""
    mesh = Mesh.of(case.parallel, "cpu")
    config: TrainConfig[Any] = TrainConfig(
        model=MODEL,
        run=RunConfig(batch_size=BATCH, micro_batch_size=case.micro_batch_size),
        data=DataConfig(seq_len=SEQ_LEN),
        parallel=case.parallel,
    )
    built = build(config, mesh, MODEL.vocab_size)
    samples = torch.randint(MODEL.vocab_size, (BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    mine = samples.chunk(mesh.dp.size)[mesh.dp.rank]
    options = StepOptions(micro_batch_size=case.micro_batch_size, lr=1e-4)

    def step() -> float:
        return train_step(built.runner, built.gradients, built.optimizer, mine, options).loss

    return step


def main(rounds: int, output: Path) -> None:
    """Measure every layout of as many processes as there are, and write their samples."""
    torch.set_num_threads(1)
    world = Mesh.create(device="cpu")
    mine = cases(world.world.size)
    steps = {case.name: step_of(case) for case in mine}
    losses = {name: step() for name, step in steps.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4 * max(losses.values()):
        raise RuntimeError(f"the layouts are not the same model: their losses are {losses}")
    samples = harness.run_rounds(dict(steps), rounds, torch.device("cpu"), f"{world.world.size} processes, round")
    if dist.get_rank() == 0:
        found = {name: [asdict(sample) for sample in taken] for name, taken in samples.items()}
        harness.write_json(output, {"losses": losses, "samples": found})
    world.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
