"""Wrong training, done on purpose, is seen: each control must make the check of tests/train/test_weights.py fail."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

import tpformer
from tests.distributed import Ranks
from tests.proofs.cases import TOLERANCE, Layout, Measured, build_random, llama, mismatches
from tpformer import Mesh
from tpformer.parallel.data import GradientBuckets
from tpformer.placement import Placement
from tpformer.train.optimizer import Optimizer
from tpformer.train.schedule import OptimizerConfig
from tpformer.train.step import StepOptions, train_step

CONFIG = llama(num_kv_heads=1, qk_norm=True)
OPTIMIZER = OptimizerConfig(lr=0.01, eps=1e-3)
FP64 = torch.float64


def samples_of(step: int, seed: int = 0) -> torch.Tensor:
    """A batch (4, 9) of 101 tokens."""
    return torch.randint(101, (4, 9), generator=torch.Generator().manual_seed(1000 * seed + step))


def train(mesh: Mesh, control: str) -> Measured | str:
    """Weights, losses and norms of three steps, one of them done wrong; or full_parameter's complaint."""
    model = build_random(CONFIG, mesh, FP64)
    buckets, optimizer = GradientBuckets(model, mesh), Optimizer(model, mesh, OPTIMIZER)
    if control == "copies count in the norm":
        optimizer.placements = {name: counting_copies(p) for name, p in optimizer.placements.items()}
    reports = []
    for step in range(3):
        samples = samples_of(step).chunk(mesh.dp.size)[mesh.dp.rank]
        if control == "replicas read the same":
            samples = samples_of(step).chunk(mesh.dp.size)[0]
        if control == "tp ranks read others":
            samples = samples_of(step, seed=mesh.tp.rank).chunk(mesh.dp.size)[mesh.dp.rank]
        reports.append(train_step(model, buckets, optimizer, samples, StepOptions(micro_batch_size=2, lr=0.01)))
    try:
        found = {name: tpformer.full_parameter(model, name).numpy() for name, _ in model.named_parameters()}
    except RuntimeError as error:
        return str(error)
    found["losses"] = np.array([report.loss for report in reports])
    found["norms"] = np.array([report.grad_norm for report in reports])
    return found


def counting_copies(placement: Placement) -> Placement:
    """Every copy says that it is the one that counts."""
    return replace(placement, pieces=tuple(replace(piece, copy=0) for piece in placement.pieces))


def train_on(layout: Layout, control: str) -> Measured | str:
    """On a rank."""
    return train(layout.mesh(), control)


@lru_cache
def reference() -> Measured:
    """One process."""
    found = train(Mesh(), "")
    assert isinstance(found, dict)
    return found


def wrong_names(found: Measured) -> set[str]:
    """What the check reports."""
    return {line.split()[0] for line in mismatches(reference(), found, TOLERANCE[FP64])}


@pytest.mark.parametrize("layout", [Layout(2, 2), Layout(2, 1, True)], ids=str)
def test_without_a_mistake_nothing_is_reported(layout: Layout, ranks: Ranks) -> None:
    for found in ranks(train_on, layout.world_size, layout, ""):
        assert isinstance(found, dict)
        assert wrong_names(found) == set()


@pytest.mark.parametrize("layout", [Layout(4), Layout(2, 1, True), Layout(2, 2)], ids=str)
def test_a_copy_counted_twice_in_the_norm_is_seen(layout: Layout, ranks: Ranks) -> None:
    """In every norm, in every weight (they are all clipped by it) and in the losses after the first step."""
    for found in ranks(train_on, layout.world_size, layout, "copies count in the norm"):
        assert isinstance(found, dict)
        assert wrong_names(found) == reference().keys()
        assert (found["norms"] > 1.001 * reference()["norms"]).all()
        assert found["losses"][0] == pytest.approx(reference()["losses"][0], rel=1e-12)


def test_replicas_that_read_the_same_are_seen(ranks: Ranks) -> None:
    for found in ranks(train_on, 4, Layout(2, 2), "replicas read the same"):
        assert isinstance(found, dict)
        assert wrong_names(found) == reference().keys()
        assert (np.abs(found["losses"] / reference()["losses"] - 1) > 1e-3).all()


@pytest.mark.parametrize("layout", [Layout(2), Layout(2, 1, True), Layout(2, 2)], ids=str)
def test_tensor_parallel_ranks_that_read_different_samples_are_seen(layout: Layout, ranks: Ranks) -> None:
    """Copies that must agree have gone apart, or everything is wrong."""
    for found in ranks(train_on, layout.world_size, layout, "tp ranks read others"):
        if isinstance(found, str):
            assert "copies of this tensor differ" in found
        else:
            assert wrong_names(found) == reference().keys()
