"""The sum of a weight's gradients: what it holds, and what it refuses."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpformer import ColumnParallelLinear
from tpformer.layers.gradient_sum import GradientSum, gradient_sum, set_gradient_sum, write_products

FP64 = torch.float64


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=FP64, generator=torch.Generator().manual_seed(sum(shape)))


def started() -> GradientSum:
    """A sum of NaN, which the first gradient must replace."""
    return GradientSum(torch.full((6, 4), torch.nan, dtype=FP64))


@pytest.mark.parametrize("interleave", [1, 2, 3])
def test_products_and_gradients_add_up(interleave: int) -> None:
    total = started()
    x, dy, gradient = noise(5, 4), noise(5, 6), noise(6, 4)
    dys = [dy[:, i::interleave] for i in range(interleave)]  # output i has the rows i, i + interleave, ...
    for _ in range(2):
        total.add_products(dys, x, "auto")
        total.add(gradient)
        total.add_products(dys, x, "torch")
        torch.testing.assert_close(total.total, 2 * dy.T @ x + gradient, rtol=1e-12, atol=1e-12)
        total.restart()  # and the next one replaces it
        total.add(gradient)
        assert torch.equal(total.total, gradient)
        total.restart()


def test_interleaved_outputs_in_another_order_are_another_gradient() -> None:
    """Negative control."""
    x, dy = noise(5, 4), noise(5, 6)
    dys = [dy[:, i::2] for i in range(2)]
    right = write_products(torch.empty(6, 4, dtype=FP64), dys, x, True, "auto")
    wrong = write_products(torch.empty(6, 4, dtype=FP64), dys[::-1], x, True, "auto")
    torch.testing.assert_close(right, dy.T @ x, rtol=1e-12, atol=1e-12)
    assert (wrong - right).abs().max() > 0.1


def test_what_was_sent_takes_nothing_more() -> None:
    total = started()
    total.add(noise(6, 4))
    before = total.total.clone()
    total.closed = True
    for add in (lambda: total.add(noise(6, 4)), lambda: total.add_products([noise(5, 6)], noise(5, 4), "auto")):
        with pytest.raises(RuntimeError, match="after its sum had been sent to the other ranks"):
            add()
        assert torch.equal(total.total, before)
    total.restart()
    total.add(noise(6, 4))


def test_a_layer_leaves_its_weight_s_gradient_there_and_nowhere_else() -> None:
    layer, x = ColumnParallelLinear(4, 6).double(), noise(2, 5, 4)
    total = started()
    set_gradient_sum(layer.weight, total)
    with torch.no_grad():
        layer(x)
    layer.weight.requires_grad_(False)
    layer(x)
    layer.weight.requires_grad_(True)
    assert total.empty
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(total.total, x.sum((0, 1)).expand(6, 4), rtol=1e-12, atol=1e-12)
    set_gradient_sum(layer.weight, None)
    assert gradient_sum(layer.weight) is None
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("copy", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_a_layer_has_gradients_of_its_own(copy: Callable[[nn.Module], Any]) -> None:
    layer = ColumnParallelLinear(4, 6).double()
    set_gradient_sum(layer.weight, started())
    copied = copy(layer)
    copied(noise(2, 5, 4)).sum().backward()
    assert gradient_sum(copied.weight) is None
    assert copied.weight.grad is not None
    total = gradient_sum(layer.weight)
    assert total is not None
    assert total.empty
