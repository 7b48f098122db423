"""Offsets past 2^31 numbers: inputs whose rows lie that far apart, and outputs that are that long.

The memory is a sparse file of which only the touched pages exist. Of long outputs the interpreter computes what the
last program of the whole grid writes; a device computes them whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import tpformer_kernels as ops
from tests.kernels.cases import CASES, EPS, PLACE, TRAINED, P, gradient
from tests.kernels.support import DEVICE, TOLERANCE, assert_near, close, evaluate, exact, outputs_of, replaced
from tpformer_kernels import library, tables
from tpformer_kernels.jit import jit, tl

HALF, INT32 = torch.float16, 1 << 31
START = INT32  # an offset that wraps around to a negative one stays within the memory
TOTAL = START + 5 * (1 << 30) + (1 << 20)

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.skipif(
        DEVICE == "cuda" and torch.cuda.get_device_properties(0).total_memory < 40 << 30, reason="needs 40 GB"
    ),
]


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tensor]:
    """fp16 zeros, TOTAL of them."""
    if DEVICE == "cuda":
        yield torch.zeros(TOTAL, dtype=HALF, device=DEVICE)
        return
    path: Path = tmp_path_factory.mktemp("sparse") / "memory"
    yield torch.from_file(str(path), shared=True, size=TOTAL, dtype=HALF)
    path.unlink()


def far(memory: Tensor, x: Tensor, dim: int) -> Tensor:
    """The numbers of x where neighbours along a dim are 2^30 apart, or 2^31 if there are few."""
    strides = list(x.contiguous().stride())
    strides[dim] = (1 << 30) + 16 if x.shape[dim] > 3 else INT32 + 16
    return memory.as_strided(x.shape, strides, START).copy_(x)


def places(x: Tensor) -> list[int]:
    """The dims along which numbers can lie far apart."""
    return [dim for dim in range(x.dim() - 1) if x.shape[dim] > 1 and x.dtype == HALF]


@jit
def _copying_kernel(x_ptr, y_ptr, stride, columns, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copies a row; without WIDE the mistake that the tests below look for."""
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + column, column < columns, 0.0)
    tl.store(y_ptr + row * columns + column, x, column < columns)


@pytest.mark.parametrize("wide", [True, False])
def test_a_kernel_of_32_bit_offsets_is_caught(memory: Tensor, wide: bool) -> None:
    x = far(memory, torch.randn(4, 6, dtype=HALF, device=DEVICE), 0)
    y = torch.zeros(4, 6, dtype=HALF, device=DEVICE)
    library.launch(_copying_kernel, (4,), x, y, x.stride(0), 6, WIDE=wide, BLOCK=8)
    assert torch.equal(y[:2], x[:2])
    assert torch.equal(y[2:], x[2:]) is wide


@pytest.mark.parametrize("name", CASES)
def test_inputs_far_apart(memory: Tensor, name: str) -> None:
    case = CASES[name]
    inputs = case.inputs(4, 6, HALF)
    for i, x in enumerate(inputs):
        for dim in places(x):
            moved = [far(memory, x, dim) if n == i else other for n, other in enumerate(inputs)]
            result = evaluate(lambda *x: case.ours(*x, backend="triton"), moved, case.trained)
            expected = exact(case.torchs, inputs, case.trained, result.cotangents)
            assert_near(result, expected, TOLERANCE[HALF])


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_far_apart(memory: Tensor, name: str) -> None:
    case = TRAINED[name]
    inputs = case.inputs(4, 6, HALF)
    dys = [torch.randn_like(y) for y in outputs_of(case.ours(*inputs, backend="triton"))]
    expected = exact(case.torchs, inputs, case.trained, dys)
    for i, dy in enumerate(dys):
        for dim in places(dy):
            moved = [far(memory, dy, dim) if n == i else other for n, other in enumerate(dys)]
            assert_near(
                evaluate(lambda *x: case.ours(*x, backend="triton"), inputs, case.trained, moved),
                expected,
                TOLERANCE[HALF],
            )


def test_logits_far_apart_in_place(memory: Tensor) -> None:
    logits, targets, lse, *abc = CASES["cross_entropy_gradient"].inputs(4, 6, HALF)
    expected = gradient(*(x.double() if x.is_floating_point() else x for x in (logits, targets, lse, *abc)))
    moved = far(memory, logits, 0)
    ops.cross_entropy_gradient(moved, targets, 6, lse, tuple(abc), inplace=True, backend="triton")  # type: ignore[arg-type]
    close(moved, expected, TOLERANCE[HALF])


@contextmanager
def long_outputs(memory: Tensor) -> Iterator[None]:
    """What is allocated past 2^30 numbers lies behind the middle of the memory, where a wrong offset does no harm."""
    used, new_empty = [START], torch.Tensor.new_empty

    def allocate(x: Tensor, *shape: Any, **options: Any) -> Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if size.numel() <= 1 << 30:
            return new_empty(x, *shape, **options)
        used.append(used[-1] + size.numel())
        return memory[used[-2] : used[-1]].view(size)

    with patch.object(torch.Tensor, "new_empty", allocate):
        yield


@contextmanager
def many_programs() -> Iterator[None]:
    """So many that even the loops over rows are short."""
    real = tables.options

    def options(kernel: str, size: int, device: torch.device) -> dict[str, int]:
        found = real(kernel, size, device)
        return found | {"PROGRAMS": 1 << 14} if kernel in ("norm_backward", "bias_gelu_backward") else found

    with replaced("options", options):
        yield


@contextmanager
def last_program(part: int = -1) -> Iterator[None]:
    """Under the interpreter only the last program of each grid runs (of a second dim, that of number `part`)."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime.interpreter import interpreter_builder as builder

    real = library.launch

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        dims = (*grid, 1, 1)[:3]
        index = (dims[0] - 1, part % dims[1], 0)
        with (
            patch.object(builder, "set_grid_dim", lambda *_: setattr(builder, "grid_dim", dims)),
            patch.object(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", index)),
        ):
            real(kernel, (1,), *arguments, **options)

    with replaced("launch", launch):
        yield


def rows_for(columns: int, kernel: str = "") -> int:
    """As many rows as give 2^31 numbers and more, the last of them the last program's."""
    rows = INT32 // columns + 1
    meta = tables.options(kernel, columns, torch.device(DEVICE)) if kernel else {}
    group = meta.get("PROGRAMS", 1) * meta.get("BLOCK_ROWS", 1)
    return (rows + group - 1) // group * group


def row_of(columns: int) -> Tensor:
    return torch.randn(columns, dtype=HALF, device=DEVICE)


def norm(columns: int) -> tuple[Tensor, Tensor]:
    x, weight, rows = row_of(columns), row_of(columns), rows_for(columns)
    y, total = ops.add_rms_norm(x.expand(rows, -1), x.expand(rows, -1), weight, EPS, backend="triton")
    expected = TRAINED["add_rms_norm"].torchs(x.double(), x.double(), weight.double())
    return torch.stack([y[-1], total[-1]]), torch.stack(expected)


def norm_backward(columns: int) -> tuple[Tensor, Tensor]:
    dy, x, weight, rows = row_of(columns), row_of(columns), row_of(columns), rows_for(columns, "norm_backward")
    rstd = x.float().square().mean().add(EPS).rsqrt()
    statistics = (rstd.new_empty(0), rstd.expand(rows, 1).contiguous())
    many = [t.expand(rows, -1) for t in (dy, dy, x)]
    dx = torch.ops.tpformer.norm_backward(*many, weight, *statistics, False, False, False)[0][-1]
    expected = exact(TRAINED["rms_norm"].torchs, [x, weight], 2, [dy]).gradients[0] + dy.double()
    return dx, expected


def bias_gelu(columns: int) -> tuple[Tensor, Tensor]:
    x, bias = row_of(columns), row_of(columns)
    y = ops.bias_gelu(x.expand(rows_for(columns), -1), bias, backend="triton")[-1, -512:]
    return y, torch.nn.functional.gelu(x.double() + bias.double())[-512:]


def bias_gelu_backward(columns: int) -> tuple[Tensor, Tensor]:
    x, dy, rows = row_of(columns), row_of(columns), rows_for(columns, "bias_gelu_backward")
    many = (dy.expand(rows, -1), x.expand(rows, -1))
    dx = torch.ops.tpformer.bias_gelu_backward(*many, None, False, False)[0][-1]
    return dx[-256:], exact(torch.nn.functional.gelu, [x], 1, [dy]).gradients[0][-256:]


def dropout(columns: int) -> tuple[Tensor, Tensor]:
    x, rows = row_of(columns), rows_for(columns)
    y = ops.dropout_add(x.expand(rows, 1, -1), x.expand(rows, 1, -1), P, PLACE, backend="triton")
    seed, sample, position = PLACE
    place = (seed, sample + rows - 1, position)
    kept = ops.dropout_add(torch.ones(1, 1, columns, device=DEVICE), None, P, place, backend="torch")[0, 0] != 0
    return y[-1, 0], torch.where(kept, x.double() / (1 - P), 0.0) + x


def rope(part: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The last keys, or of the first part the last queries."""

    def run(width: int) -> tuple[Tensor, Tensor]:
        x, angle = torch.randn(8, width, device=DEVICE).to(HALF), torch.randn(512, 1, width // 2, device=DEVICE)
        many = x.expand(rows_for(512 * 8 * width), 512, 8, width)
        y = ops.apply_rope(many, many, angle.cos(), angle.sin(), backend="triton")[part][-1, -1]
        cos, sin, (first, second) = angle.cos()[-1], angle.sin()[-1], x.double().chunk(2, -1)
        return y, torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    return run


def logits(columns: int) -> tuple[Tensor, Tensor]:
    x, rows = row_of(columns), rows_for(columns)
    targets, zeros = torch.full((rows,), columns - 1, device=DEVICE), torch.zeros(rows, device=DEVICE)
    lse, ones = x.double().logsumexp(0), torch.ones(rows, device=DEVICE)
    weights = (ones, ones, zeros)
    y = ops.cross_entropy_gradient(
        x.expand(rows, -1), targets, columns, lse.float().expand(rows), weights, backend="triton"
    )
    expected = (x.double() - lse).exp()
    expected[-1] -= 1
    return y[-1, -100:], expected[-100:]


LONG = {
    "norm": (norm, 1024, -1),
    "norm, wide": (norm, 16385, -1),
    "norm_backward": (norm_backward, 8192, -1),
    "norm_backward, wide": (norm_backward, 8193, -1),
    "bias_gelu": (bias_gelu, 65536, -1),
    "bias_gelu_backward": (bias_gelu_backward, 8192, -1),
    "dropout": (dropout, 1024, -1),
    "rope, queries": (rope(0), 128, 0),
    "rope, keys": (rope(1), 128, -1),
    "cross_entropy_gradient": (logits, 131071, -1),
}
"""What to call, with how many columns, and which program of the last row computes what is looked at."""


@pytest.mark.parametrize("name", LONG)
def test_long_outputs(memory: Tensor, name: str) -> None:
    run, columns, part = LONG[name]
    with long_outputs(memory), many_programs(), last_program(part):
        ours, expected = run(columns)
    close(ours, expected, TOLERANCE[HALF])


@pytest.mark.parametrize("pairs", [(1 << 30) + 1024, INT32 + 1024])
def test_long_gated_activations(memory: Tensor, pairs: int) -> None:
    """Also where twice the number of pairs is past 2^31, but not the number itself."""
    gate_up = memory[: 2 * pairs].view(-1, 2048)
    gate_up[-1] = row_of(2048)
    with last_program():
        y = torch.ops.tpformer.gated_forward(gate_up, 0)
        close(y[-1], TRAINED["gated silu"].torchs(gate_up[-1].double()), TOLERANCE[HALF])
        del y
        dy = memory[2 * pairs : 3 * pairs].view(-1, 1024)
        dy[-1] = row_of(1024)
        dx = torch.ops.tpformer.gated_backward(dy, gate_up, 0)[-1]
    close(dx, exact(TRAINED["gated silu"].torchs, [gate_up[-1]], 1, [dy[-1]]).gradients[0], TOLERANCE[HALF])
