"""What only a GPU can show of matmul: bf16 and tf32, every tile of its table many times over, CUDA graphs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.kernels.compile_matmul import ACTIVATIONS, DTYPES, EVERY_TILE, matrix
from tests.kernels.matmul_cases import ACTIVATIONS as BY_TORCH
from tests.kernels.matmul_cases import OPS
from tests.kernels.support import assert_as_good_as_torch
from tpformer_kernels import matmul_choice, matmul_ops, tables

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")

REPEATS = 50
SIZE = (1032, 1064, 520)
"""Several tiles of every kind, the last ones not full; 16 bytes divide each length."""
TABLE = matmul_choice.table(tables.architecture_of(torch.device("cuda")) if CUDA else 90)
TILES = {
    f"{family} {tile}": (family, tile, options)
    for family, tiles in TABLE["tiles"].items()
    for tile, options in tiles.items()
}


def filled(rows: int, columns: int, dtype: torch.dtype, turned: bool, padding: int) -> Tensor:
    return matrix(rows, columns, dtype, turned, padding).cuda().normal_()


def operands(family: str, layout: str) -> tuple[Tensor, Tensor]:
    """a and b that are read in the family's way: rows that are not 16 bytes apart by pointers only."""
    numbers, loads = family.split()
    padding = 0 if loads == matmul_choice.best_loads(tables.architecture_of(torch.device("cuda")), numbers) else 1
    (m, n, k), dtype = SIZE, DTYPES[numbers]
    a = filled(m, k, dtype, layout[0] == "t", padding)
    return a, filled(k, n, dtype, layout[1] == "t", padding).mul_(k**-0.5)


@contextmanager
def launched_in(family: str, tile: str, options: dict[str, int]) -> Iterator[None]:
    """This tile, read in this way, and no other."""
    choose = matmul_ops.choose

    def chosen(*place: Any, **how: Any) -> Any:
        choice = choose(*place, **how)
        assert choice.loads == family.split()[1]
        return choice._replace(tile=tile, options=options)

    with patch.object(matmul_ops, "choose", chosen):
        yield


@contextmanager
def torch_in(tf32: bool) -> Iterator[None]:
    """torch multiplies fp32 in tf32, or exactly."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def results(a: Tensor, b: Tensor, epilogue: str, tf32: bool, behind: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """One operator's, in place or not."""
    bias, residual = behind
    if epilogue in ACTIVATIONS:
        return OPS.matmul_activated(a, b, bias, ACTIVATIONS[epilogue], tf32)
    if epilogue == "accumulate":
        total = residual.to(torch.float32, copy=True)
        OPS.matmul_accumulate_(total, a.t(), b, False)
        return (total,)
    return (OPS.matmul_forward(a, b, bias, residual, tf32),)


def theirs(a: Tensor, b: Tensor, epilogue: str, behind: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The same in torch's own ops, in the dtype of a."""
    bias, residual = behind
    if epilogue in ACTIVATIONS:
        pre = torch.mm(a, b) + bias
        return list(BY_TORCH.values())[ACTIVATIONS[epilogue]](pre), pre
    if epilogue == "accumulate":
        wide = torch.promote_types(a.dtype, torch.float32)
        return (residual.to(wide) + torch.mm(a, b).to(wide),)
    return (torch.mm(a, b) + bias + residual,)


@pytest.mark.parametrize(
    ("name", "layout", "epilogue"),
    [
        (name, layout, epilogue)
        for name in TILES
        for layout, epilogue in (*EVERY_TILE, ("nt", "silu gate"))
        if not (name.startswith("tf32") and epilogue == "accumulate")  # sums of gradients are exact: there is none
    ],
)
def test_every_tile(name: str, layout: str, epilogue: str) -> None:
    """By the rule of two, and the same bits 50 times: what races, or is miscompiled, differs between runs."""
    family, tile, options = TILES[name]
    tf32 = family.startswith("tf32")
    a, b = operands(family, layout)
    behind = filled(1, SIZE[1], a.dtype, False, 0)[0], filled(SIZE[0], SIZE[1], a.dtype, False, 0)
    with launched_in(family, tile, options):
        first = results(a, b, epilogue, tf32, behind)
        for _ in range(REPEATS - 1):
            again = results(a, b, epilogue, tf32, behind)
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    with torch_in(tf32):
        by_torch = theirs(a, b, epilogue, behind)
    exact = theirs(a.double(), b.double(), epilogue, (behind[0].double(), behind[1].double()))
    for mine, torchs, right in zip(first, by_torch, exact, strict=True):
        assert_as_good_as_torch(mine, torchs, right.double(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (17, 33, 100), (1000, 64, 3000), (5, 4096, 70)], ids=str)
def test_twice_torch_s_error(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = size
    for layout in ("nn", "nt", "tn"):
        a = filled(m, k, dtype, layout[0] == "t", 0)
        b = filled(k, n, dtype, layout[1] == "t", 0)
        ours = OPS.matmul_forward(a, b, None, None, False)
        assert_as_good_as_torch(ours, torch.mm(a, b), a.double() @ b.double(), atol=1e-4)


def test_captured_in_a_graph() -> None:
    """What a descriptor says of an address is kept in the graph; the numbers there are read anew."""
    a, b = (filled(256, 256, torch.bfloat16, False, 0) for _ in range(2))
    total = torch.zeros(256, 256, device="cuda")
    OPS.matmul_accumulate_(total, a, b, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OPS.matmul_accumulate_(total, a, b, True)
        y, pre = OPS.matmul_activated(a, b, None, 0, False)
    a.normal_()
    graph.replay()
    expected = total.clone()
    OPS.matmul_accumulate_(expected, a, b, True)
    assert torch.equal(total, expected)
    for captured, eager in zip((y, pre), OPS.matmul_activated(a, b, None, 0, False), strict=True):
        assert torch.equal(captured, eager)


@pytest.mark.skipif(CUDA and torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_the_second_device() -> None:
    a, b = (filled(256, 256, torch.bfloat16, False, 0) for _ in range(2))
    there = OPS.matmul_forward(a.to("cuda:1"), b.to("cuda:1"), None, None, False)
    assert torch.equal(there.to("cuda:0"), OPS.matmul_forward(a, b, None, None, False))
