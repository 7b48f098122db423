"""gated_product, and gated_activation of pairs, against torch's activations: odd sizes, strides, low precision."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tpformer_kernels import gated_activation, gated_product

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
SHAPES = [(1, 1), (1, 9), (5, 1), (2, 3, 15), (2, 3, 16), (2, 17), (3,)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_finite_differences(activation: str, shape: tuple[int, ...]) -> None:
    gate, up = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda gate, up: gated_product(gate, up, activation), (gate, up))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_is_the_activation_times_up(activation: str, dtype: torch.dtype, rtol: float) -> None:
    gate, up, dy = torch.randn(3, 4, 31, dtype=dtype)[:, :, :, None].unbind()
    gate, up = (5 * gate).requires_grad_(), up.requires_grad_()
    ours, theirs = gated_product(gate, up, activation), ACTIVATIONS[activation](gate) * up
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    for mine, expected in zip(
        torch.autograd.grad(ours, (gate, up), dy), torch.autograd.grad(theirs, (gate, up), dy), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_interleaved_inputs_and_expanded_gradients(activation: str) -> None:
    fused = torch.randn(4, 6, 2, dtype=torch.float64)
    gate, up = (part.requires_grad_() for part in fused.unbind(-1))  # strides (12, 2)
    dy = torch.randn(6, dtype=torch.float64).expand(4, 6)
    before = fused.clone()
    ours = torch.autograd.grad(gated_product(gate, up, activation), (gate, up), dy)
    theirs = torch.autograd.grad(ACTIVATIONS[activation](gate) * up, (gate, up), dy)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(fused, before)  # the inputs are not written to


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16(activation: str) -> None:
    gate, up, dy = torch.randn(3, 8, 33).bfloat16().unbind()
    gate.requires_grad_()
    up.requires_grad_()
    y = gated_product(gate, up, activation)
    wide_gate, wide_up = (x.detach().double().requires_grad_() for x in (gate, up))
    exact = ACTIVATIONS[activation](wide_gate) * wide_up
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=1e-6)  # two roundings
    grads = torch.autograd.grad(y, (gate, up), dy)
    for mine, expected in zip(grads, torch.autograd.grad(exact, (wide_gate, wide_up), dy.double()), strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), expected, rtol=2**-7, atol=1e-6)


def test_keeps_only_its_two_inputs() -> None:
    gate, up = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    y = gated_product(gate, up, "silu")
    assert {t.data_ptr() for t in y.grad_fn.saved_tensors} == {gate.data_ptr(), up.data_ptr()}  # type: ignore[union-attr]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pairs_lie_side_by_side(activation: str, shape: tuple[int, ...]) -> None:
    gate, up, dy = torch.randn(3, *shape, dtype=torch.float64).unbind()
    pairs = torch.stack([gate, up], dim=-1).flatten(-2).requires_grad_()
    y = gated_activation(pairs, activation)
    expected = ACTIVATIONS[activation](pairs[..., 0::2]) * pairs[..., 1::2]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    (mine,), (theirs,) = torch.autograd.grad(y, pairs, dy), torch.autograd.grad(expected, pairs, dy)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
