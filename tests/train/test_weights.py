"""After three optimizer steps every weight, loss and gradient norm is that of one process, whatever the layout.

Here is what tests/proofs/test_training.py leaves out: untied GPT, tied Llama, grouped queries with KV heads above and
equal to tp, z-loss, and micro-batches of unequal size. Clipping is at work in every step. fp64 to 1e-10,
fp32 to 1e-5, per tensor. Adam divides a gradient by its own size: an element whose gradient is nothing but rounding
(a key's bias, to which softmax is blind) would move by lr whatever its sign, and no correct program could be told
from a wrong one. With eps at 1e-3, far above the rounding of fp32 and below the gradients that matter (clipped to a
norm of 1), such an element stays where it is, and an error in any real gradient still moves its weight by up to lr.
"""

from functools import lru_cache

import numpy as np
import pytest
import torch

import tpformer
from tests.distributed import Ranks
from tests.proofs.cases import RUNS, TOLERANCE, Config, Layout, Measured, build_random, gpt, llama, mismatches
from tpformer import Key, Mesh
from tpformer.parallel.data import GradientBuckets
from tpformer.train.optimizer import Optimizer
from tpformer.train.schedule import OptimizerConfig
from tpformer.train.step import StepOptions, train_step

MODELS: dict[str, Config] = {
    "gpt-untied-dropout": gpt(tie_embeddings=False, dropout=0.1, attention_dropout=0.1, activation="relu"),
    "llama-8-heads-kv4-tied": llama(num_heads=8, num_kv_heads=4, tie_embeddings=True),  # above tp 2, equal to tp 4
    "llama-kv2-bias-dropout": llama(num_kv_heads=2, qkv_bias=True, dropout=0.1),  # equal to tp 2, below tp 4
    "llama-kv1-qk-norm-tied": llama(num_kv_heads=1, qk_norm=True, tie_embeddings=True),  # below both
}
OPTIMIZER = OptimizerConfig(lr=0.01, eps=1e-3, weight_decay=0.1, clip_norm=1.0)
STEPS, BATCH, LENGTH = 3, 6, 8


def train(name: str, mesh: Mesh, dtype: torch.dtype) -> Measured:
    """Every weight after the steps, and each step's loss and gradient norm."""
    model = build_random(MODELS[name], mesh, dtype)
    buckets, optimizer = GradientBuckets(model, mesh, bucket_bytes=2048), Optimizer(model, mesh, OPTIMIZER)
    generator = torch.Generator().manual_seed(5)
    reports = []
    for step in range(STEPS):
        samples = torch.randint(101, (BATCH, LENGTH + 1), generator=generator).chunk(mesh.dp.size)[mesh.dp.rank]
        key = Key(7).fold("step", step)
        micro = 4 // mesh.dp.size  # 4 and 2 samples, or 2 and 1 on each of two replicas
        reports.append(
            train_step(
                model, buckets, optimizer, samples, StepOptions(micro_batch_size=micro, lr=0.01, key=key, z_loss=1e-3)
            )
        )
    found = {name: tpformer.full_parameter(model, name).numpy() for name, _ in model.named_parameters()}
    found["loss of each step"] = np.array([report.loss for report in reports])
    found["gradient norm of each step"] = np.array([report.grad_norm for report in reports])
    return found


def train_all(layout: Layout, dtype: torch.dtype) -> dict[str, Measured]:
    """On a rank: train every model on the layout."""
    mesh = layout.mesh()
    return {name: train(name, mesh, dtype) for name in MODELS}


@lru_cache
def reference(name: str, dtype: torch.dtype) -> Measured:
    """One process, without any process group."""
    return train(name, Mesh(), dtype)


@pytest.mark.parametrize(("layout", "dtype"), RUNS, ids=str)
def test_three_steps_end_in_the_weights_of_one_process(layout: Layout, dtype: torch.dtype, ranks: Ranks) -> None:
    for rank, found in enumerate(ranks(train_all, layout.world_size, layout, dtype)):
        for name in MODELS:
            assert mismatches(reference(name, dtype), found[name], TOLERANCE[dtype]) == [], f"{name}, rank {rank}"


@pytest.mark.parametrize("name", MODELS)
def test_the_steps_are_of_a_kind_that_could_go_wrong(name: str) -> None:
    """Clipping is at work in each, the loss moves, and each weight moves by far more than the tolerance."""
    found = reference(name, torch.float64)
    assert found["gradient norm of each step"].min() > OPTIMIZER.clip_norm
    assert len(np.unique(found["loss of each step"])) == STEPS
    before = build_random(MODELS[name], Mesh(), torch.float64)
    for parameter, tensor in before.named_parameters():
        start = tpformer.full_parameter(before, parameter).numpy()
        assert np.abs(found[parameter] - start).max() > 1e-4 * np.abs(start).max(), (parameter, tensor.shape)
