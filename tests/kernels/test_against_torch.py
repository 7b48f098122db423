"""Every op against torch's own in fp64: outputs and gradients, of odd sizes, in memory that is NaN between canaries."""

import pytest
import torch

from tests.kernels.cases import CASES
from tests.kernels.support import DTYPES, TOLERANCE, assert_near, evaluate, exact, guarded, small_tables

SIZES = [(1, 1), (2, 1), (1, 7), (3, 15), (2, 16), (5, 17), (3, 33)]
"""With the small tables, below, at and beyond a block in every dimension."""
WIDE = [(1, 1023), (2, 1025), (1, 4097)]
"""With the real tables, around the blocks that programs divide a row into."""
VERY_WIDE = [8191, 8193, 16385]
"""Around the longest rows that a norm keeps in registers."""

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def prove(name: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    """The kernels' outputs and gradients, of guarded memory, are those of torch's own ops."""
    case = CASES[name]
    with guarded() as guard:
        inputs = [guard.copy(x) for x in case.inputs(rows, columns, dtype)]
        before = [x.clone() for x in inputs]
        ours = evaluate(lambda *x: case.ours(*x, backend="triton"), inputs, case.trained)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert any(guard.owns(y) for y in ours.outputs) and len(guard.buffers) > len(inputs)
    assert all(y.dtype == dtype for y in ours.outputs) or not case.trained
    assert all(g.dtype == dtype for g in ours.gradients)
    assert_near(ours, exact(case.torchs, inputs, case.trained, ours.cotangents), TOLERANCE[dtype])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_small_blocks(name: str, size: tuple[int, int]) -> None:
    with small_tables():
        prove(name, *size, torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_small_blocks_in_fp16(name: str) -> None:
    with small_tables():
        prove(name, 5, 17, torch.float16)


@pytest.mark.parametrize("size", [(1, 1), (3, 15), *WIDE], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_real_blocks(name: str, size: tuple[int, int]) -> None:
    prove(name, *size, torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_real_blocks_in_fp16(name: str) -> None:
    prove(name, 2, 1025, torch.float16)


@pytest.mark.parametrize("name", [name for name in CASES if "norm" in name or "gelu" in name])
def test_more_rows_than_a_program_takes(name: str) -> None:
    prove(name, 35, 257, torch.float16)


@pytest.mark.parametrize("columns", VERY_WIDE)
@pytest.mark.parametrize("name", [name for name in CASES if "norm" in name])
def test_very_wide_norms(name: str, columns: int) -> None:
    prove(name, 2, columns, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (4, 16), (5, 17)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_references(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    case = CASES[name]
    inputs = case.inputs(*size, dtype)
    ours = evaluate(lambda *x: case.ours(*x, backend="torch"), inputs, case.trained)
    assert_near(ours, exact(case.torchs, inputs, case.trained, ours.cotangents), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_are_the_references(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    inputs = case.inputs(2, 9, dtype)
    ours = evaluate(lambda *x: case.ours(*x, backend="triton"), inputs, case.trained)
    theirs = evaluate(lambda *x: case.ours(*x, backend="torch"), inputs, case.trained, ours.cotangents)
    assert [x.dtype for x in ours.outputs] == [x.dtype for x in theirs.outputs]
    assert_near(ours, theirs, TOLERANCE[dtype])
