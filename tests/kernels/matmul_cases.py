"""What the tests of matmul share: matrices as they may lie in memory, small tiles, and what is right, in fp64."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.support import DEVICE, TOLERANCE, close
from tpformer_kernels import bias_gelu, gated_activation, matmul_choice, matmul_ops

OPS: Any = torch.ops.tpformer
LAYOUTS = ("nn", "nt", "tn", "tt")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu gate": lambda x: F.silu(x[:, 0::2]) * x[:, 1::2],
    "gelu gate": lambda x: F.gelu(x[:, 0::2]) * x[:, 1::2],
    "gelu_tanh gate": lambda x: F.gelu(x[:, 0::2], approximate="tanh") * x[:, 1::2],
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""In the order of their numbers."""


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def matrix(rows: int, columns: int, dtype: torch.dtype, letter: str) -> Tensor:
    """n: its rows are contiguous; t: its columns are."""
    return noise(rows, columns, dtype=dtype) if letter == "n" else noise(columns, rows, dtype=dtype).t()


def operands(size: tuple[int, int, int], dtype: torch.dtype, layout: str = "nn") -> tuple[Tensor, Tensor]:
    """a (m, k) and b (k, n)."""
    m, n, k = size
    return matrix(m, k, dtype, layout[0]), matrix(k, n, dtype, layout[1])


@contextmanager
def small_tiles(slices: int = 1, loads: str | None = None) -> Iterator[None]:
    """Tiles so small, and programs so few, that each has several; loads: on an architecture of pointers, or of both."""
    tile = {
        "BLOCK_M": 16,
        "BLOCK_N": 32,
        "BLOCK_K": 16,
        "GROUP_M": 2,
        "SLICES": slices,
        "num_warps": 4,
        "num_stages": 2,
    }
    families = ["half pointers", "tf32 pointers", "ieee pointers"]
    if loads == "descriptors":
        families += ["half descriptors", "tf32 descriptors"]
    read = {"tiles": {family: {"small": tile} for family in families}, "shapes": {}}
    programs = patch.object(matmul_ops, "programs", lambda device: 4)
    with patch.object(matmul_choice, "table", lambda architecture: read), programs:
        yield


def loads_of(a: Tensor, b: Tensor) -> str:
    """How the kernel would read them."""
    fit = matmul_choice.descriptors_fit(a, b)
    return matmul_choice.choose("nn plain", a.shape[0], b.shape[1], a.shape[1], a.dtype, a.device, fit=fit).loads


def assert_forward(a: Tensor, b: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """matmul_forward is right, and contiguous in a's dtype; gives what it gave."""
    y = OPS.matmul_forward(a, b, bias, residual, False)
    expected = a.double() @ b.double()
    for term in (bias, residual):
        expected = expected if term is None else expected + term.double()
    assert y.dtype == a.dtype and y.is_contiguous()
    close(y, expected, TOLERANCE[a.dtype])
    return y


def assert_activated(a: Tensor, b: Tensor, bias: Tensor | None, name: str) -> None:
    """pre is the matmul, bit for bit, and y the activation of pre, bit for bit that of the op for it alone."""
    y, pre = OPS.matmul_activated(a, b, bias, list(ACTIVATIONS).index(name), False)
    assert y.dtype == pre.dtype == a.dtype and y.is_contiguous() and pre.is_contiguous()
    close(y, ACTIVATIONS[name](pre.double()), TOLERANCE[a.dtype])
    assert torch.equal(pre, assert_forward(a, b, bias))
    kind, gate, _ = name.partition(" gate")
    alone = gated_activation(pre, kind, backend="triton") if gate else bias_gelu(pre, None, kind, backend="triton")
    assert torch.equal(y, alone)


def assert_accumulated(total: Tensor, a: Tensor, b: Tensor, first: bool, called: bool | None = None) -> None:
    """matmul_accumulate_ of a (k, m) and b (k, n) is right; `called` is a wrong `first` that the kernel gets."""
    expected = a.double().t() @ b.double() + (0 if first else total.double())
    place = total.data_ptr()
    OPS.matmul_accumulate_(total, a, b, first if called is None else called)
    assert total.data_ptr() == place
    close(total, expected, TOLERANCE[torch.float32])
