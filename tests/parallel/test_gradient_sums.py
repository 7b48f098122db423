"""Linear layers' weights under gradient buckets: their matmuls sum their gradients, however the layers are used."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tpformer
from tests.distributed import Ranks
from tests.layers.prove import Results, fill, noise, on_layouts, prove, take
from tpformer import ColumnParallelLinear, Mesh, RowParallelLinear
from tpformer.layers import gradient_sum
from tpformer.parallel.data import GradientBuckets

D, F = 6, 8
Sums = dict[str, Tensor]


class Every(nn.Module):
    """Every kind of linear layer that has a weight to sum: plain, packed, apart, row; x (b, s, d) -> (b, s, d)."""

    def __init__(self, mesh: Mesh = Mesh()):
        super().__init__()
        self.up = ColumnParallelLinear(D, F, bias=False, mesh=mesh)
        self.packed = ColumnParallelLinear(D, 2 * F, mesh=mesh, interleave=2)
        self.apart = ColumnParallelLinear(D, 2 * F, bias=False, mesh=mesh, interleave=2)
        self.down = RowParallelLinear(F, D, bias=False, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.apart(x, apart=True)
        packed = self.packed(x)
        return self.down(torch.tanh(gate) * up + self.up(x) * packed[..., ::2] + packed[..., 1::2])


def build(mesh: Mesh = Mesh(), dtype: torch.dtype = torch.float64) -> Every:
    """The same weights everywhere."""
    model = Every(mesh).to(dtype)
    fill(model, mesh)
    return model


def inputs(parts: int, mesh: Mesh = Mesh(), dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """x and dy (2, 8, d) of each micro-batch."""
    whole = [(noise(f"x{i}", 2, 8, D).to(dtype), noise(f"dy{i}", 2, 8, D).to(dtype)) for i in range(parts)]
    return [(take(x, "tokens", mesh), take(dy, "tokens", mesh)) for x, dy in whole]


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "once": lambda model, x, dy: (model(x) * dy).sum(),
    "twice": lambda model, x, dy: (model(model(x)) * dy).sum(),
    "penalised": lambda model, x, dy: (model(x) * dy).sum() + sum(p.square().sum() for p in model.parameters()),
    "checkpointed": lambda model, x, dy: (checkpoint(model, x, use_reentrant=False) * dy).sum(),
    "checkpointed twice": lambda model, x, dy: (
        checkpoint(model, checkpoint(model, x, use_reentrant=False), use_reentrant=False) * dy
    ).sum(),
    "checkpointed, reentrant": lambda model, x, dy: (
        checkpoint(model, x.clone().requires_grad_(), use_reentrant=True) * dy
    ).sum(),
    "checkpointed twice, reentrant": lambda model, x, dy: (
        checkpoint(model, checkpoint(model, x.clone().requires_grad_(), use_reentrant=True), use_reentrant=True) * dy
    ).sum(),
}


def step(model: nn.Module, buckets: GradientBuckets, parts: Sequence[tuple[Tensor, Tensor]], loss: Loss) -> Sums:
    """One step's gradients."""
    for number, (x, dy) in enumerate(parts):
        buckets.start(last=number == len(parts) - 1)
        loss(model, x, dy).backward()
    return {name: total.clone() for name, total in buckets.finish().items()}


def of_autograd(model: nn.Module, parts: Sequence[tuple[Tensor, Tensor]], loss: Loss) -> Sums:
    """The same without buckets."""
    for x, dy in parts:
        loss(model, x, dy).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def error(found: Sums, expected: Sums) -> float:
    """The largest, relative to the largest number of each gradient."""
    assert found.keys() == expected.keys()
    return max(((found[n] - g).abs().max() / g.abs().max()).item() for n, g in expected.items())


# 1. the sums are right


def run(parts: int, loss: str) -> Results:
    def case(mesh: Mesh, dtype: torch.dtype) -> Sums:
        model, dp = build(mesh, dtype), mesh.dp.size
        buckets = GradientBuckets(model, mesh, bucket_bytes=1)
        for _ in range(2):  # the second step's are returned: nothing of the first is left in them
            found = step(model, buckets, inputs(parts, mesh, dtype), lambda *x: LOSSES[loss](*x) / dp)
        for name, parameter in model.named_parameters():
            parameter.grad = found[name]
        return {name: tpformer.full_gradient(model, name) for name in found}

    return on_layouts(case)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("loss", ["once", "twice"])
def test_the_sums_are_autograd_s_on_every_layout(loss: str, parts: int, ranks: Ranks) -> None:
    prove(ranks, run, of_autograd(build(), inputs(parts), LOSSES[loss]), parts, loss)


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
@pytest.mark.parametrize("loss", LOSSES)
def test_however_the_layers_are_used(loss: str, bucket_bytes: int) -> None:
    model = build()
    expected = of_autograd(model, inputs(2), LOSSES[loss])
    buckets = GradientBuckets(model, Mesh(), bucket_bytes)
    for _ in range(2):
        assert error(step(model, buckets, inputs(2), LOSSES[loss]), expected) < 1e-12


@contextmanager
def always(first: bool) -> Iterator[None]:
    """Every product replaces what is there, or none does."""
    real: Callable[..., Tensor] = gradient_sum.write_products
    with patch.object(gradient_sum, "write_products", lambda *x: real(*x[:3], first, x[4])):
        yield


@pytest.mark.parametrize("first", [True, False])
def test_a_sum_that_forgets_or_never_forgets_is_seen(first: bool) -> None:
    """Negative control: parts that replace each other, and steps that add to each other."""
    model = build()
    expected = of_autograd(model, inputs(3), LOSSES["once"])
    buckets = GradientBuckets(model, Mesh(), bucket_bytes=1)
    with always(first):
        for _ in range(2):
            found = step(model, buckets, inputs(3), LOSSES["once"])
    assert {name for name in found if error({name: found[name]}, {name: expected[name]}) > 0.1} == {
        "up.weight",
        "packed.weight",
        "apart.weight",
        "down.weight",
    }


# 2. which of them autograd never sees


def made_by_autograd(model: nn.Module) -> set[str]:
    """Grows by the names of the parameters of which autograd makes a gradient; call it before there are buckets."""
    made: set[str] = set()

    def hook_of(name: str) -> Callable[[Tensor], None]:
        return lambda p: made.add(name) if p.grad is not None else None

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(hook_of(name))
    return made


def test_no_gradient_of_a_weight_is_ever_made() -> None:
    """And again once the buckets are closed, which is the control."""
    model = build()
    made = made_by_autograd(model)
    buckets = GradientBuckets(model, Mesh())
    expected = step(model, buckets, inputs(2), LOSSES["once"])
    assert made == {"packed.bias"}
    buckets.close()
    assert error(of_autograd(model, inputs(2), LOSSES["once"]), expected) < 1e-12
    assert made == dict(model.named_parameters()).keys()


def test_bf16_on_a_cpu_is_autograd_s() -> None:
    model = build(dtype=torch.bfloat16)
    parts = inputs(3, dtype=torch.bfloat16)
    single = [of_autograd(model, [part], LOSSES["once"]) for part in parts]
    made = made_by_autograd(model)
    found = step(model, GradientBuckets(model, Mesh()), parts, LOSSES["once"])
    assert made == found.keys() == dict(model.named_parameters()).keys()
    for name, total in found.items():
        assert torch.equal(total, torch.stack([gradients[name].float() for gradients in single]).sum(0))


def test_frozen_weights_have_no_sum() -> None:
    model = build()
    expected = of_autograd(model, inputs(2), LOSSES["once"])
    model.apart.weight.requires_grad_(False)
    buckets = GradientBuckets(model, Mesh())
    model.up.weight.requires_grad_(False)  # one that the buckets know
    found = step(model, buckets, inputs(2), LOSSES["once"])
    assert found.pop("up.weight").abs().max() == 0
    del expected["up.weight"], expected["apart.weight"]
    assert error(found, expected) < 1e-12


class Tied(nn.Module):
    """Two modules of one weight, the second of any kind, and a layer of its own."""

    def __init__(self, kind: Any):
        super().__init__()
        self.first, self.own = (ColumnParallelLinear(D, D, bias=False).double() for _ in range(2))
        self.second = kind(D, D, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.second(torch.tanh(self.first(x))))


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear, nn.Linear])
def test_a_weight_of_two_modules_is_summed_over_both(kind: Any) -> None:
    """By our layer's matmul, and by autograd for a module that is not ours."""
    model = Tied(kind)
    expected = of_autograd(model, inputs(2), LOSSES["once"])
    made = made_by_autograd(model)
    found = step(model, GradientBuckets(model, Mesh()), inputs(2), LOSSES["once"])
    assert made == ({"first.weight"} if kind is nn.Linear else set())
    assert error(found, expected) < 1e-12


# dynamo's own tracing does what autograd deprecates
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_s_gradients_are_autograd_s() -> None:
    model = build()
    expected = of_autograd(model, inputs(2), LOSSES["once"])
    made = made_by_autograd(model)
    buckets = GradientBuckets(model, Mesh())
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = step(model, buckets, inputs(2), lambda _, x, dy: (compiled(x) * dy).sum())
    assert made == expected.keys()
    assert error(found, expected) < 1e-12
    assert error(step(model, buckets, inputs(2), LOSSES["once"]), expected) < 1e-12, "and without it"
