"""matmul's operators against fp64: layouts, odd sizes, strides, guarded memory, and kernels broken on purpose."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.matmul_cases import (
    ACTIVATIONS,
    LAYOUTS,
    OPS,
    assert_accumulated,
    assert_activated,
    assert_forward,
    loads_of,
    matrix,
    noise,
    operands,
    small_tiles,
)
from tests.kernels.support import DEVICE, DTYPES
from tpformer_kernels import matmul_ops
from tpformer_kernels.matmul_choice import descriptors_fit

HALF = torch.float16
SIZES = [(1, 1, 1), (33, 17, 20), (17, 100, 33), (16, 32, 16), (20, 34, 100)]
EMPTY = [(0, 5, 3), (3, 0, 5), (3, 6, 0), (0, 0, 0)]
ALIGNED = (40, 72, 24)
"""No multiple of a tile, but of what descriptors need."""

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_layout(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    for layout in LAYOUTS:
        with small_tiles():
            assert_forward(*operands(size, dtype, layout))


@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_residual(dtype: torch.dtype, slices: int) -> None:
    a, b = operands((20, 34, 20), dtype)
    bias, residual = noise(34, dtype=dtype), noise(20, 34, dtype=dtype)
    with small_tiles(slices):
        assert_forward(a, b, bias)
        assert_forward(a, b, None, residual)
        assert_forward(a, b, bias.float(), residual.float())  # of another dtype


def test_one_rounding() -> None:
    """Bias and residual are added in fp32: apart, each would round away."""
    ones, small = torch.ones(4, 16, device=DEVICE, dtype=HALF), torch.full((16,), 2.0**-11, device=DEVICE, dtype=HALF)
    eye = torch.eye(16, device=DEVICE, dtype=HALF)
    y = OPS.matmul_forward(ones, eye, small, small.expand(4, 16), False)
    assert torch.equal(y, ones + 2.0**-10)


@pytest.mark.parametrize("size", EMPTY, ids=str)
def test_nothing_to_multiply(size: tuple[int, int, int]) -> None:
    m, n, _ = size
    a, b = operands(size, HALF)
    bias, residual = noise(n, dtype=HALF), noise(m, n, dtype=HALF)
    assert_forward(a, b, bias, residual)
    assert_accumulated(noise(m, n), a.t(), b, False)
    assert_accumulated(noise(m, n), a.t(), b, True)
    if n % 2 == 0:
        for name in ACTIVATIONS:
            assert_activated(a, b, bias, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, dtype: torch.dtype) -> None:
    a, b = operands((20, 50, 20), dtype, "nt")
    with small_tiles(4 if dtype == HALF else 1):
        assert_activated(a, b, noise(50, dtype=dtype), name)
        assert_activated(a, b, None, name)


def test_the_activation_is_of_the_rounded_sum_in_committed_tiles() -> None:
    assert_activated(*operands((130, 132, 70), HALF, "nt"), noise(132, dtype=HALF), "silu gate")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_over_parts_in_place(dtype: torch.dtype) -> None:
    """Three parts in rows that lie apart; what is between the rows stays."""
    whole = torch.full((20, 64), 7.0, device=DEVICE)
    total, expected = whole[:, 3:37], torch.zeros(20, 34, dtype=torch.float64, device=DEVICE)
    with small_tiles():
        for part in range(3):
            a, b = noise(17 + part, 20, dtype=dtype), noise(17 + part, 34, dtype=dtype)
            expected += a.double().t() @ b.double()
            assert_accumulated(total, a, b, part == 0)
        assert_accumulated(total.t(), b, a, False)  # the columns of the sum may be the contiguous ones
    torch.testing.assert_close(total.double(), expected + a.double().t() @ b.double(), rtol=1e-5, atol=1e-4)
    assert (whole[:, :3] == 7).all() and (whole[:, 37:] == 7).all()


def strided() -> dict[str, Callable[[Tensor], Tensor]]:
    """The same numbers elsewhere in memory."""

    def rows_apart(x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], x.shape[1] + 5)[:, 2 : 2 + x.shape[1]].copy_(x)

    def every_other(x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], 2 * x.shape[1])[:, ::2].copy_(x)

    def unaligned(x: Tensor) -> Tensor:
        return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)

    return {"rows apart": rows_apart, "every other column": every_other, "unaligned": unaligned}


@pytest.mark.parametrize("name", strided())
def test_strides(name: str) -> None:
    move = strided()[name]
    a, b = operands((24, 40, 24), HALF)
    bias, residual = noise(40, dtype=HALF), noise(24, 40, dtype=HALF)
    with small_tiles(loads="descriptors"):
        expected = assert_forward(a, b, bias, residual)
        for one, two, three in [(move(a), b, residual), (a, move(b), residual), (a, b, move(residual))]:
            assert torch.equal(OPS.matmul_forward(one, two, bias, three, False), expected)
        assert torch.equal(OPS.matmul_forward(a, b, move(bias[:, None])[:, 0], residual, False), expected)


def test_expanded_inputs() -> None:
    a, b = operands((20, 34, 20), HALF)
    with small_tiles():
        assert_forward(a, b, noise(1, dtype=HALF).expand(34), noise(34, dtype=HALF).expand(20, 34))
        assert_forward(a, b, None, noise(20, 1, dtype=HALF).expand(20, 34))
        assert_forward(a[:1].expand(20, -1), b[:, :1].expand(-1, 34))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_descriptors_and_pointers_give_the_same_bits(layout: str) -> None:
    a, b = operands(ALIGNED, HALF, layout)
    bias, residual = noise(ALIGNED[1], dtype=HALF), noise(ALIGNED[0], ALIGNED[1], dtype=HALF)
    found = []
    for loads in ("descriptors", "pointers"):
        with small_tiles(4, loads):
            assert loads_of(a, b) == loads
            total = torch.ones(ALIGNED[0], ALIGNED[1], device=DEVICE)
            OPS.matmul_accumulate_(total, a.t(), b, False)
            found.append((assert_forward(a, b, bias, residual), total, *OPS.matmul_activated(a, b, bias, 0, False)))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("fits", "make"),
    [
        (True, lambda: noise(8, 16, dtype=HALF)),
        (True, lambda: noise(16, 8, dtype=HALF).t()),
        (True, lambda: noise(8, 32, dtype=HALF)[:, 8:24]),
        (False, lambda: noise(8, 17, dtype=HALF)),  # its rows are not aligned
        (False, lambda: noise(8, 32, dtype=HALF)[:, ::2]),
        (False, lambda: noise(1, 16, dtype=HALF).expand(8, 16)),
        (False, lambda: noise(0, 16, dtype=HALF)),
    ],
)
def test_what_descriptors_can_read(fits: bool, make: Callable[[], Tensor]) -> None:
    with small_tiles(loads="descriptors"):
        other = matrix(16, 16, HALF, "n")
        assert descriptors_fit(make(), other) is descriptors_fit(other, make()) is fits
        assert loads_of(other.float(), other.float()) == "pointers"  # IEEE products


def test_a_start_that_is_not_aligned_is_read_by_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(matmul_ops, "launch", lambda kernel, *arguments, **options: launched.append(kernel.__name__))
    memory, b = noise(16, 32, dtype=HALF), noise(16, 16, dtype=HALF)
    with small_tiles(loads="descriptors"):
        for start in (8, 7):
            OPS.matmul_forward(memory[:, start : start + 16], b, None, None, False)
            OPS.matmul_forward(b, memory[:, start : start + 16], None, None, False)
    assert launched == 2 * ["matmul_descriptor_kernel"] + 2 * ["matmul_kernel"]


def test_the_same_bits_every_time() -> None:
    a, b = operands((40, 72, 40), HALF)
    with small_tiles():
        first = OPS.matmul_forward(a, b, None, None, False)
        assert all(torch.equal(first, OPS.matmul_forward(a, b, None, None, False)) for _ in range(3))


def test_tf32_is_for_fp32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    precisions: list[str] = []
    monkeypatch.setattr(matmul_ops, "launch", lambda *arguments, **flags: precisions.append(flags["PRECISION"]))
    for dtype in DTYPES:
        for tf32 in (True, False):
            OPS.matmul_forward(*operands((4, 4, 4), dtype), None, None, tf32)
    assert precisions == ["tf32", "ieee", "ieee", "ieee"]


def test_torch_counts_its_flops() -> None:
    a, b = operands((3, 4, 5), torch.float32)
    with FlopCounterMode(display=False) as counter:
        OPS.matmul_forward(a, b, None, None, False)
        OPS.matmul_activated(a, b, None, 0, False)
        OPS.matmul_accumulate_(noise(3, 4), a.t(), b, True)
    assert counter.get_total_flops() == 3 * 2 * 3 * 4 * 5
