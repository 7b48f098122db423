"""An op without gradients is its forward: the same numbers, and nothing kept."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tpformer_kernels import add_layer_norm, apply_rope, gated_product, rms_norm, split_and_rotate


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def table() -> tuple[Tensor, Tensor]:
    angles = torch.arange(12.0).view(3, 1, 4)
    return angles.cos(), angles.sin()


OPS: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]] = {
    "rms_norm": lambda: rms_norm(x(2, 3, 8), x(8, seed=1), 1e-5),
    "add_layer_norm": lambda: add_layer_norm(x(2, 3, 8), x(2, 3, 8, seed=1), x(8, seed=2), x(8, seed=3), 1e-5),
    "split_and_rotate": lambda: split_and_rotate(1 * x(2, 3, 2, 4, 8), *table()),
    "apply_rope": lambda: apply_rope(x(2, 3, 4, 8), x(2, 3, 2, 8, seed=1), *table()),
    "gated_product": lambda: gated_product(x(2, 3, 8), x(2, 3, 8, seed=1), "silu"),
}


@pytest.mark.parametrize("name", OPS)
def test_without_gradients_an_op_gives_the_same_numbers(name: str) -> None:
    with_gradient = OPS[name]()
    with torch.no_grad():
        without = OPS[name]()
    pairs = zip(*((y,) if isinstance(y, Tensor) else y for y in (with_gradient, without)), strict=True)
    for expected, found in pairs:
        assert expected.requires_grad
        assert not found.requires_grad
        assert torch.equal(found, expected)
