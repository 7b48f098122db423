"""matmul's kernels in guarded memory and past 32-bit offsets; and broken on purpose, which these tests must see."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.matmul_cases import (
    assert_accumulated,
    assert_activated,
    assert_forward,
    matrix,
    noise,
    operands,
    small_tiles,
)
from tests.kernels.support import DEVICE, guarded
from tpformer_kernels import matmul_kernels, matmul_ops

HALF = torch.float16
ALIGNED = (40, 72, 24)
"""No multiple of a tile, but of what descriptors need."""

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def assert_all(layout: str, slices: int, loads: str) -> None:
    """One call of each operator, in guarded memory: NaN around the inputs, canaries around the outputs."""
    m, n, k = ALIGNED
    bias, residual = noise(n, dtype=HALF), noise(m, n, dtype=HALF)
    with small_tiles(slices, loads), guarded() as guard:
        a, b = (guard.copy(matrix(*shape, HALF, "n")) for shape in ((m, k), (k, n)))
        a = guard.copy(a.t()).t() if layout[0] == "t" else a
        b = guard.copy(b.t()).t() if layout[1] == "t" else b
        bias, residual = guard.copy(bias), guard.copy(residual)
        assert_forward(a, b, bias, residual)
        assert_activated(a, b, bias, "silu gate")
        assert_activated(a, b, None, "gelu")
        assert_accumulated(guard.copy(noise(m, n)), a.t(), b, False)


@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
@pytest.mark.parametrize(("layout", "slices"), [("nn", 1), ("nt", 4), ("tn", 1)])
def test_guarded_memory(layout: str, slices: int, loads: str) -> None:
    assert_all(layout, slices, loads)


BOTH = ("pointers", "descriptors")
WRONG = {
    "no bias": ("sums += tl.load(bias_ptr + column, column < n, 0.0).to(tl.float32)", "sums += 0.0", BOTH),
    "no residual": ("sums += tl.load(residual_ptr + offset, inside, 0.0).to(tl.float32)", "sums += 0.0", BOTH),
    "gate and up swapped": ("gate, up = tl.split(", "up, gate = tl.split(", BOTH),
    "activation before rounding": ("x = pre.to(tl.float32)", "x = sums", BOTH),
    "erf for tanh": ("activate_block(x, ACTIVATION - 2)", "activate_block(x, ACTIVATION - 1)", BOTH),
    "a is not masked in k": (
        "(row < m) & (inner < k)[None, :]",
        "(row < m) & (inner < k + 16)[None, :]",
        ("pointers",),
    ),
    "b is not masked in k": (
        "(inner < k)[:, None] & (column < n)",
        "(inner < k + 16)[:, None] & (column < n)",
        ("pointers",),
    ),
    "rows are not masked": ("inside = (row < m) & (column < n)", "inside = (row < m + 16) & (column < n)", BOTH),
    "columns are not masked": ("inside = (row < m) & (column < n)", "inside = (row < m) & (column < n + 32)", BOTH),
    "pairs are not masked": ("(row < m) & (pair < n // 2)", "(row < m) & (pair < n)", BOTH),
    "tiles left out": ("tl.num_programs(0)", "2 * tl.num_programs(0)", BOTH),
    "groups overlap": ("first = tile // group * GROUP_M", "first = tile // group", BOTH),
    "slices swapped": ("third, fourth = ", "fourth, third = ", BOTH),
    "a part of k left out": ("range(0, k, BLOCK_K)", "range(BLOCK_K, k, BLOCK_K)", BOTH),
}


def replace_kernels(monkeypatch: pytest.MonkeyPatch, directory: Path, right: str, wrong: str) -> None:
    """The operators launch a copy of the kernels with other text in it."""
    source = Path(str(matmul_kernels.__file__)).read_text(encoding="utf-8")
    assert right in source
    path = directory / "wrong_kernels.py"
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("wrong_kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(matmul_ops, "kernels", module)


@pytest.mark.parametrize(("name", "loads"), [(name, loads) for name, wrong in WRONG.items() for loads in wrong[2]])
def test_a_wrong_kernel_is_caught(name: str, loads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: each mistake, made in a copy of the kernels, breaks the test above."""
    replace_kernels(monkeypatch, tmp_path, *WRONG[name][:2])
    with pytest.raises(AssertionError):
        assert_all("nn", 4, loads)


def test_the_copy_itself_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_kernels(monkeypatch, tmp_path, "", "")
    assert_all("nn", 4, "pointers")


def test_a_wrong_first_is_caught() -> None:
    a, b = noise(20, 20, dtype=HALF), noise(20, 34, dtype=HALF)
    for first in (True, False):
        with small_tiles(), pytest.raises(AssertionError):
            assert_accumulated(noise(20, 34), a, b, first, called=not first)


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Zeros past 2^32, in fp32, of which only the touched pages exist."""
    if DEVICE == "cuda":
        return torch.zeros((1 << 32) + (1 << 22), device=DEVICE)
    path = tmp_path_factory.mktemp("sparse") / "memory"
    whole = torch.from_file(str(path), shared=True, size=(1 << 32) + (1 << 22))
    path.unlink()
    return whole


def far(memory: Tensor, x: Tensor, dim: int) -> Tensor:
    """The numbers of x with the last along a dim past 2^31 of the first; a negative offset would stay in the memory."""
    strides = list(x.contiguous().stride())
    strides[dim] = (1 << 31) // (x.shape[dim] - 1) // 16 * 16 + 16
    return memory.view(x.dtype).as_strided(x.shape, strides, 1 << 31).copy_(x)


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_properties(0).total_memory < 40 << 30, reason="needs 40 GB"
)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("loads", BOTH)
def test_offsets_past_32_bits(memory: Tensor, dim: int, loads: str) -> None:
    a, b = operands((24, 40, 24), HALF)
    residual = noise(24, 40, dtype=HALF)
    with small_tiles(loads=loads):
        assert_forward(far(memory, a, dim), b)
        assert_forward(a, far(memory, b, dim))
        assert_forward(a, b, None, far(memory, residual, dim))
        assert_accumulated(far(memory, noise(24, 40), dim), a.t(), b, False)


@pytest.mark.skipif(DEVICE == "cuda", reason="a device's memory is not asked for what is beyond it")
def test_offsets_of_32_bits_are_caught(memory: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_kernels(monkeypatch, tmp_path, ".to(tl.int64)", "")
    a, b = operands((24, 40, 24), HALF)
    for one, two, residual in [
        (far(memory, a, 0), b, None),
        (a, far(memory, b, 1), None),
        (a, b, far(memory, noise(24, 40, dtype=HALF), 0)),
    ]:
        with small_tiles(), pytest.raises(AssertionError):
            assert_forward(one, two, None, residual)
