"""An overflow on one process of any axis: every process skips the step, and none has changed a weight."""

import math

import pytest
import torch

from tests.distributed import Ranks
from tests.proofs.compositions import VOCABULARY, Composition, batch, double
from tpformer import Axis, Mesh, ParallelConfig
from tpformer.train.build import build
from tpformer.train.step import StepOptions, train_step

LAYOUTS = {
    "pp 2": ParallelConfig(precision="fp16", pp=2),
    "pp 2 x tp 2, zbv": ParallelConfig(precision="fp16", pp=2, tp=2, pp_schedule="zbv"),
    "pp 2 x dp 2, fsdp": ParallelConfig(precision="fp16", pp=2, dp=2, dp_mode="fsdp"),
    "dp 2, zero2": ParallelConfig(precision="fp16", dp=2, dp_mode="zero2"),
    "dp 4, hsdp": ParallelConfig(precision="fp16", dp=4, dp_mode="hsdp", dp_shard=2),
}


def after_an_overflow(parallel: ParallelConfig, rank: int, alone: bool = False) -> tuple[bool, float, bool]:
    """On a rank: whether the step was skipped, the scale after it, and whether a weight of this process changed.

    alone: the control, in which each process decides for itself.
    """
    with double(torch.float32):
        mesh = Mesh.of(parallel, "cpu")
        built = build(Composition("llama", parallel).config(), mesh, VOCABULARY)
    if alone:
        built.optimizer.mesh = Mesh(world=Axis("world"))
    finish = built.gradients.finish

    def finished() -> dict[str, torch.Tensor]:
        gradients = finish()
        if mesh.world.rank == rank:
            next(x for x in gradients.values() if x.numel()).view(-1)[0] = math.inf
        return gradients

    built.gradients.finish = finished  # type: ignore[method-assign]
    before = {name: weight.clone() for name, weight in built.optimizer.masters.items()}
    samples = batch(0).chunk(mesh.dp.size)[mesh.dp.rank]
    report = train_step(built.runner, built.gradients, built.optimizer, samples, StepOptions(2, 0.01))
    changed = any(not torch.equal(before[name], weight) for name, weight in built.optimizer.masters.items())
    return report.skipped, built.optimizer.loss_scale, changed


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_process_skips_what_one_cannot_use(name: str, ranks: Ranks) -> None:
    p = LAYOUTS[name]
    world_size = p.pp * p.tp * (p.dp or 1)
    for rank in (0, world_size - 1):
        assert ranks(after_an_overflow, world_size, p, rank) == [(True, 2.0**15, False)] * world_size
    assert ranks(after_an_overflow, world_size, p, -1) == [(False, 2.0**16, True)] * world_size


@pytest.mark.parametrize("name", ["pp 2", "dp 2, zero2"])
def test_a_decision_by_each_process_alone_would_be_seen(name: str, ranks: Ranks) -> None:
    skipped = [report for report, *_ in ranks(after_an_overflow, 2, LAYOUTS[name], 1, True)]
    assert skipped == [False, True]
