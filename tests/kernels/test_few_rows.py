"""Few rows times a weight, the other way round: the same product, taken only where it is known to be faster."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tpformer_kernels import matmul

module: Any = sys.modules["tpformer_kernels.matmul"]  # whose name is that of its function


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """On any machine, and how many rows were turned."""
    rows: list[int] = []
    inner = module._turned
    monkeypatch.setattr(module, "onednn_is_possible", lambda: True)

    def noted(a: Tensor, b: Tensor) -> Tensor:
        rows.append(len(a))
        return inner(a, b)

    monkeypatch.setattr(module, "_turned", noted)
    return rows


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 24), (1, 24, 40), (2, 24, 40), (3, 40, 24), (4, 24, 24)])
def test_it_is_the_product(m: int, n: int, k: int, with_residual: bool, with_bias: bool, turned: list[int]) -> None:
    a, weight = noise(m, k), noise(n, k)
    bias, residual = noise(n) if with_bias else None, noise(m, n) if with_residual else None
    expected = a.double() @ weight.double().t()
    for added in (bias, residual):
        expected = expected if added is None else expected + added
    found = matmul(a, weight.t(), bias, residual)
    assert turned == [m]
    assert found.is_contiguous()
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    strided = noise(m, 2 * k)[:, ::2]
    assert torch.allclose(matmul(strided, weight.t()), strided @ weight.t(), atol=1e-5)
    assert turned == [m, m]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (noise(5, 24), noise(40, 24).t()),
        (noise(0, 24), noise(40, 24).t()),
        (noise(2, 24), noise(0, 24).t()),
        (noise(4, 40), noise(24, 40).t()),
        (noise(1, 24), noise(24, 40)),
        (noise(1, 24), noise(80, 24)[::2].t()),
        (noise(1, 24, dtype=torch.float64), noise(40, 24, dtype=torch.float64).t()),
        (noise(1, 24, dtype=torch.bfloat16), noise(40, 24, dtype=torch.bfloat16).t()),
    ],
    ids=["rows", "none", "no columns", "wide", "weight as it lies", "gaps", "fp64", "bf16"],
)
def test_others_are_as_they_were(a: Tensor, b: Tensor, turned: list[int]) -> None:
    assert torch.equal(matmul(a, b), a @ b)
    assert turned == []


def test_who_asks_for_torch_gets_it(turned: list[int]) -> None:
    a, b = noise(2, 24), noise(40, 24).t()
    assert torch.equal(matmul(a, b, backend="torch"), a @ b)
    matmul(a, b, out=torch.empty(2, 40))
    assert turned == []


def test_elsewhere_nothing_changes(monkeypatch: pytest.MonkeyPatch, turned: list[int]) -> None:
    monkeypatch.setattr(module, "onednn_is_possible", lambda: False)
    a, b = noise(2, 24), noise(40, 24).t()
    assert torch.equal(matmul(a, b), a @ b)
    assert turned == []
