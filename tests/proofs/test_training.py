"""Training does not depend on the layout either: every weight after three optimizer steps is that of one process.

AdamW with decay, clipping at work in every step, two micro-batches a step, dropout in one model; fp64 to 1e-10,
fp32 to 1e-5. Adam divides by the root of a gradient's square: an element whose gradient is nothing but rounding
(the key biases of a GPT, to which softmax is blind) is divided by eps alone, so eps is kept well above fp32 noise.
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
    "gpt-tied-dropout": gpt(dropout=0.1, attention_dropout=0.1),
    "llama-kv1-bias-tied": llama(num_kv_heads=1, qkv_bias=True, out_bias=True, tie_embeddings=True),
    "qwen3-kv2-untied": llama(num_kv_heads=2, qk_norm=True, head_dim=12),
}
OPTIMIZER = OptimizerConfig(lr=0.01, eps=1e-4, weight_decay=0.1, clip_norm=1.0)
STEPS = 3


def train(name: str, mesh: Mesh, dtype: torch.dtype) -> Measured:
    """Every weight after the steps, and each step's loss and gradient norm."""
    model = build_random(MODELS[name], mesh, dtype)
    # buckets so small that there are many
    buckets, optimizer = GradientBuckets(model, mesh, bucket_bytes=4096), Optimizer(model, mesh, OPTIMIZER)
    generator = torch.Generator().manual_seed(5)
    reports = []
    for step in range(STEPS):
        samples = torch.randint(101, (4, 9), generator=generator).chunk(mesh.dp.size)[mesh.dp.rank]
        key = Key(7).fold("step", step)
        micro = len(samples) // 2
        reports.append(
            train_step(model, buckets, optimizer, samples, StepOptions(micro_batch_size=micro, lr=0.01, key=key))
        )
    found = {name: tpformer.full_parameter(model, name).numpy() for name, _ in model.named_parameters()}
    found["loss of each step"] = np.array([report.loss for report in reports])
    found["gradient norm of each step"] = np.array([report.grad_norm for report in reports])
    return found


def train_on(name: str, layout: Layout, dtype: torch.dtype) -> Measured:
    """On a rank: train on the layout's mesh."""
    return train(name, layout.mesh(), dtype)


@lru_cache
def reference(name: str, dtype: torch.dtype) -> Measured:
    """One process, without any process group."""
    return train(name, Mesh(), dtype)


@pytest.mark.parametrize(("layout", "dtype"), RUNS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_three_steps_end_in_the_weights_of_one_process(
    name: str, layout: Layout, dtype: torch.dtype, ranks: Ranks
) -> None:
    for rank, found in enumerate(ranks(train_on, layout.world_size, name, layout, dtype)):
        assert mismatches(reference(name, dtype), found, TOLERANCE[dtype]) == [], f"rank {rank}"


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_is_plain_adamw(name: str) -> None:
    """torch's AdamW on the whole batch, clipped in two lines, without micro-batches or buckets, to the same weights."""
    model = build_random(MODELS[name], Mesh(), torch.float64)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    generator = torch.Generator().manual_seed(5)
    norms = []
    for step in range(STEPS):
        samples = torch.randint(101, (4, 9), generator=generator)
        adamw.zero_grad()
        model.loss(samples[:, :-1], samples[:, 1:], key=Key(7).fold("step", step)).backward()
        norms.append(clip(model, OPTIMIZER.clip_norm))
        adamw.step()
    expected = reference(name, torch.float64)
    found = {n: tpformer.full_parameter(model, n).numpy() for n, _ in model.named_parameters()}
    found["gradient norm of each step"] = np.array(norms)
    assert mismatches({n: expected[n] for n in found}, found, TOLERANCE[torch.float64]) == []
    assert min(norms) > OPTIMIZER.clip_norm, "clipping must have been at work"


def clip(model: torch.nn.Module, largest: float) -> float:
    """The norm of all gradients, which are scaled down to `largest` (torch's own function adds 1e-6 to the norm)."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    torch._foreach_mul_(gradients, largest / norm)
    return norm
