"""The proofs once more with the Triton kernels, on a CPU interpreted: loss, logits and gradients at any layout.

Triton computes in fp32, and is compared with the plain torch backend in fp64 on one process.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tpformer.layers.mlp
from tests.distributed import Ranks
from tests.layers.prove import interpreted
from tests.proofs.cases import (
    TOLERANCE,
    Config,
    Layout,
    Measured,
    build_random,
    gpt,
    llama,
    measure_model,
    mismatches,
)
from tpformer import Key, Mesh
from tpformer.parallel.data import GradientBuckets
from tpformer_kernels import Backend, gated_activation

MODELS: dict[str, tuple[Config, Key | None]] = {
    "llama": (llama(num_layers=1, num_kv_heads=2), None),
    "llama-qk-norm-window-dropout-gelu": (
        replace(
            llama(num_layers=1, num_kv_heads=2, qk_norm=True, activation="gelu", tie_embeddings=True, dropout=0.3),
            sliding_window=5,
            attention_dropout=0.3,
        ),
        Key(11),
    ),
    "gpt-gelu": (gpt(num_layers=1, activation="gelu"), None),
    "gpt-gelu-tanh-dropout": (gpt(num_layers=1, dropout=0.3, tie_embeddings=False), Key(11)),
}
LAYOUTS = [Layout(2), Layout(2, 1, True), Layout(4), Layout(4, 1, True)]
pytestmark = interpreted


def measured(name: str, mesh: Mesh, dtype: torch.dtype, backend: Backend) -> Measured:
    config, key = MODELS[name]
    return measure_model(build_random(replace(config, backend=backend), mesh, dtype), key, samples=2)


def measure_triton(name: str, layout: Layout) -> Measured:
    """On a rank: fp32, every op that has a kernel in its kernel."""
    return measured(name, layout.mesh(), torch.float32, "triton")


@lru_cache
def reference(name: str) -> Measured:
    """On one process: fp64, plain torch."""
    return measured(name, Mesh(), torch.float64, "torch")


def wrong(name: str, found: Measured) -> list[str]:
    """What is further from the reference than fp32's tolerance."""
    assert {x.dtype for x in found.values()} == {np.dtype("float32")}
    doubled = {parameter: x.astype(np.float64) for parameter, x in found.items()}
    return mismatches(reference(name), doubled, TOLERANCE[torch.float32])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_triton_in_fp32_is_torch_in_fp64_on_one_process(name: str, layout: Layout, ranks: Ranks) -> None:
    for rank, found in enumerate(ranks(measure_triton, layout.world_size, name, layout)):
        assert wrong(name, found) == [], f"rank {rank}"


class Operators(TorchDispatchMode):
    """The names of our own operators that run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tpformer" and func.overloadpacket.__name__ != "accumulate_":  # a matmul of torch
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


EVERY = {"norm_forward", "norm_backward", "cross_entropy_statistics", "cross_entropy_gradient_"}
EVERY |= {"matmul_forward", "matmul_activated", "attention_forward", "attention_backward"}
OPERATORS = {
    "llama": EVERY | {"rope", "rope_pack", "gated_backward"},
    # with norms between them the projection is not rotated where it lies
    "llama-qk-norm-window-dropout-gelu": EVERY | {"rope", "gated_backward", "dropout_add"},
    "gpt-gelu": EVERY | {"bias_gelu_backward"},
    "gpt-gelu-tanh-dropout": EVERY | {"bias_gelu_backward", "dropout_add"},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_op_of_a_model_runs_in_its_kernel_and_with_torch_none(name: str) -> None:
    with Operators() as operators:
        found = measured(name, Mesh(), torch.float32, "triton")
    assert wrong(name, found) == []
    assert operators.names == OPERATORS[name]
    with Operators() as operators:
        measured(name, Mesh(), torch.float32, "torch")
    assert operators.names == set()


def test_a_kernel_that_takes_gate_for_up_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the loss, the logits and every gradient differ."""

    def swapped(gate_up: Tensor, activation: str, **options: Any) -> Tensor:
        turned = gate_up.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return gated_activation(turned, activation, backend=options["backend"])  # not the one already computed

    monkeypatch.setattr(tpformer.layers.mlp, "gated_activation", swapped)
    found = measured("llama", Mesh(), torch.float32, "triton")
    assert {line.split()[0] for line in wrong("llama", found)} == found.keys()


def test_the_kernel_sums_the_weights_gradients_over_micro_batches() -> None:
    """In fp32 buckets, against autograd in fp64."""
    config, _ = MODELS["llama"]
    samples = torch.randint(config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(5))
    plain = build_random(replace(config, backend="torch"), Mesh(), torch.float64)
    plain.loss(samples[:, :-1], samples[:, 1:]).backward()
    model = build_random(replace(config, backend="triton"), Mesh(), torch.float32)
    buckets = GradientBuckets(model, Mesh())
    with Operators() as operators:
        for number, part in enumerate(samples.split(1)):
            buckets.start(last=number == 1)
            (model.loss(part[:, :-1], part[:, 1:]) / 2).backward()
    assert "matmul_accumulate_" in operators.names
    found = buckets.finish()
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        assert (found[name] - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max(), name
