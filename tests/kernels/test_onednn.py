"""oneDNN's products are torch's own in every layout, and it is given operands that it is fast on."""

import platform
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.support import assert_as_good_as_torch
from tpformer_kernels import onednn

Operands = tuple[Tensor, Tensor]
needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN, or not this operator",
)


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="elsewhere torch may lack it")
def test_the_operator_is_there() -> None:
    """Or else every test that needs it would be skipped in silence."""
    assert not needs_onednn.args[0]


def inside(shape: tuple[int, ...], view: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Random numbers in a part of a tensor that is NaN everywhere else."""
    part = view(torch.full(shape, torch.nan))
    return part.copy_(torch.randn(part.shape))


def offset(start: int, *shape: int) -> Tensor:
    """Memory that begins at an odd address."""
    return inside((start + shape[0] * shape[1],), lambda x: x[start:].view(shape))


LAYOUTS: dict[str, Callable[[int, int, int], Operands]] = {
    "NN": lambda m, k, n: (inside((m, k)), inside((k, n))),
    "NT": lambda m, k, n: (inside((m, k)), inside((n, k)).t()),
    "TN": lambda m, k, n: (inside((k, m)).t(), inside((k, n))),
    "TT": lambda m, k, n: (inside((k, m)).t(), inside((n, k)).t()),
    "every other row of the weight": lambda m, k, n: (inside((m, k)), inside((2 * n, k), lambda x: x[::2]).t()),
    "columns of the weight": lambda m, k, n: (inside((m, k)), inside((n, 2 * k), lambda x: x[:, k:]).t()),
    "every other row of both": lambda m, k, n: (
        inside((2 * m, k), lambda x: x[1::2]),
        inside((2 * k, n), lambda x: x[::2]),
    ),
    "every other number": lambda m, k, n: (
        inside((m, 2 * k), lambda x: x[:, ::2]),
        inside((n, 3 * k), lambda x: x[:, 1::3]).t(),
    ),
    "one row for all": lambda m, k, n: (inside((1, k)).expand(m, k), inside((k, 1)).expand(k, n)),
    "odd addresses": lambda m, k, n: (offset(1, m, k), offset(3, k, n)),
}
STRIDED = [name for name in LAYOUTS if "every other" in name or "columns" in name]
SIZES = [(33, 17, 29), (64, 128, 96), (1, 17, 29), (33, 1, 29), (33, 17, 1), (1, 1, 1)]
BIASES: dict[str, Callable[[int], Tensor | None]] = {
    "no bias": lambda n: None,
    "bias": lambda n: inside((n,)),
    "strided bias": lambda n: inside((3 * n,), lambda x: x[1::3]),
    "one number for all": lambda n: inside((1,)).expand(n),
}


def check(product: Callable[..., Tensor], a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """The product is torch's, to twice its error; contiguous; and the operands are as they were."""
    operands = [a, b] if bias is None else [a, b, bias]
    before = [x.clone() for x in operands]
    ours = product(a, b, bias)
    assert all(torch.equal(x, y) for x, y in zip(operands, before, strict=True))
    theirs = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    expected = a.double() @ b.double() + (0 if bias is None else bias.double())
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    assert ours.is_contiguous()
    if ours.numel():
        assert_as_good_as_torch(ours, theirs, expected, 2.0**-23 * scale)
    assert ours.shape == theirs.shape


@needs_onednn
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_torch_s_product_in_every_layout(layout: str, size: tuple[int, int, int]) -> None:
    for bias in BIASES.values():
        check(onednn.onednn_matmul, *LAYOUTS[layout](*size), bias(size[2]))


@needs_onednn
@pytest.mark.parametrize("size", [(0, 5, 7), (5, 0, 7), (5, 7, 0), (0, 0, 0)], ids=str)
def test_empty_products_are_torch_s(size: tuple[int, int, int]) -> None:
    for bias in BIASES.values():
        check(onednn.onednn_matmul, *LAYOUTS["NT"](*size), bias(size[2]))


WRONG: dict[str, Callable[..., Tensor]] = {
    "bias forgotten": lambda a, b, bias: torch.mm(a, b),
    "bias read as contiguous": lambda a, b, bias: torch.addmm(bias.as_strided(bias.shape, (1,)), a, b),
    "gaps read": lambda a, b, bias: torch.addmm(bias, a, b.t().as_strided(b.t().shape, (b.shape[0], 1)).t()),
    "bf16": lambda a, b, bias: torch.addmm(bias.bfloat16(), a.bfloat16(), b.bfloat16()).float(),
    "not contiguous": lambda a, b, bias: torch.addmm(bias, a, b).t().contiguous().t(),
    "a written to": lambda a, b, bias: torch.addmm(bias, a.add_(1), b),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_product_is_seen(name: str) -> None:
    """Negative controls."""
    operands = LAYOUTS["every other row of the weight"](33, 17, 29)
    with pytest.raises(AssertionError):
        check(WRONG[name], *operands, BIASES["strided bias"](29))


@needs_onednn
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "as they lie"])
def test_onednn_is_given_dense_operands(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code for others is a thousand times slower; negative control: without `_dense` it would be given such."""
    given: list[bool] = []
    real = torch.ops.mkldnn._linear_pointwise

    def spy(a: Tensor, weight: Tensor, *others: Any) -> Tensor:
        given.extend(x.is_contiguous() or x.t().is_contiguous() for x in (a, weight))
        return real(a, weight, *others)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    if not dense:
        monkeypatch.setattr(onednn, "_dense", lambda x: x)
    for name in STRIDED:
        onednn.onednn_matmul(*LAYOUTS[name](33, 17, 29))
    assert len(given) == 2 * len(STRIDED)
    assert all(given) == dense


def test_a_dense_operand_is_not_copied() -> None:
    x = torch.randn(3, 5)
    assert onednn._dense(x) is x
    assert onednn._dense(x.t()).data_ptr() == x.data_ptr()
