"""The quick interpreter gives the bits and the errors of Triton's own, which it leaves as it was."""

import multiprocessing

import pytest
import torch
from torch import Tensor

from tests.interpreter import quick
from tests.kernels.attention_cases import EVERYTHING, Shape, ours
from tests.kernels.cases import CASES
from tests.kernels.matmul_cases import OPS, operands, small_tiles
from tests.kernels.support import evaluate, small_tables
from tpformer_kernels.jit import INTERPRETED, jit, tl

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton compiles here")


@jit
def _sum_kernel(out_ptr, N: tl.constexpr, M: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(out_ptr + tl.arange(0, N), tl.arange(0, N) + tl.arange(0, M))


def every_op() -> list[Tensor]:
    """Outputs and gradients of every kernel, of a few numbers in small blocks."""
    torch.manual_seed(0)
    found: list[Tensor] = []
    with small_tables():
        for case in CASES.values():
            inputs = case.inputs(3, 17, torch.float16)
            result = evaluate(lambda *x, case=case: case.ours(*x, backend="triton"), inputs, case.trained)
            found += [*result.outputs, *result.gradients]
        result = evaluate(ours(EVERYTHING), Shape(1, 2, 1, 18, 18).inputs(), 3)
        found += [*result.outputs, *result.gradients]
    for loads in ("pointers", "descriptors"):
        with small_tiles(4, loads):
            a, b = operands((24, 40, 24), torch.float16)
            found += OPS.matmul_activated(a, b, None, 0, False)
    return found


def message() -> str:
    """What a kernel says that adds blocks of 16 and 32 numbers."""
    try:
        _sum_kernel[(1,)](torch.zeros(32, dtype=torch.int32), N=32, M=16)
    except Exception as error:
        return str(error)
    return "nothing was raised"


def compare() -> list[tuple[list[Tensor], str]]:
    """In a process of its own, where nothing is quick yet: as it is, quick, and as it is again."""
    torch.set_num_threads(1)
    found = [(every_op(), message())]
    with quick():
        found.append((every_op(), message()))
    return [*found, ([], message())]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_the_same_bits_and_errors() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (slow, first), (fast, second), (_, third) = pool.apply(compare)
    assert len(slow) == len(fast) > len(CASES)
    for x, y in zip(slow, fast, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    assert "incompatible dimensions" in first
    assert first == second == third
