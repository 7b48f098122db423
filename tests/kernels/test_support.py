"""The guards guard: kernels with a mistake are caught by the means that the other tests rely on."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import CASES
from tests.kernels.support import (
    DEVICE,
    assert_as_good_as_torch,
    assert_near,
    evaluate,
    exact,
    guarded,
    replaced,
    small_tables,
)
from tpformer_kernels import gated, library, rms_norm
from tpformer_kernels.jit import jit, tl


@jit
def _doubling_kernel(x_ptr, y_ptr, size, first, last, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Reads below `last` and writes from `first` to `last`: right if 0 and size."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < last, 0.0)
    tl.store(y_ptr + i, 2 * x, (i >= first) & (i < last))


def doubled(x: Tensor, first: int = 0, more: int = 0) -> Tensor:
    y = torch.empty_like(x)
    library.launch(_doubling_kernel, (1,), x, y, x.numel(), first, x.numel() + more, BLOCK=64)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_right_kernel_passes(dtype: torch.dtype) -> None:
    with guarded() as guard:
        x = guard.copy(torch.arange(33, dtype=dtype, device=DEVICE))
        y = doubled(x)
    assert torch.equal(y, 2 * x)
    assert guard.owns(x) and guard.owns(y)
    assert not guard.owns(2 * x)


def test_what_a_kernel_leaves_unwritten_is_nan() -> None:
    with guarded() as guard:
        y = doubled(guard.copy(torch.ones(33, device=DEVICE)), first=1)
    assert y[0].isnan() and y[1:].eq(2).all()


@pytest.mark.parametrize("more", [1, 31])
def test_a_store_beyond_the_output_is_caught(more: int) -> None:
    with pytest.raises(AssertionError, match="outside"), guarded() as guard:
        doubled(guard.copy(torch.ones(33, device=DEVICE)), more=more)


def test_a_store_into_what_surrounds_an_input_is_caught() -> None:
    with pytest.raises(AssertionError, match="outside"), guarded() as guard:
        x = guard.copy(torch.ones(33, device=DEVICE))
        library.launch(_doubling_kernel, (1,), torch.ones(64, device=DEVICE), x, 33, 0, 34, BLOCK=64)


def test_a_load_beyond_an_input_is_seen() -> None:
    with guarded() as guard:
        x, y = guard.copy(torch.ones(33, device=DEVICE)), torch.zeros(64, device=DEVICE)
        library.launch(_doubling_kernel, (1,), x, y, 33, 0, 34, BLOCK=64)
    assert y[33].isnan()


def test_every_way_to_allocate_is_guarded() -> None:
    x = torch.ones(3, device=DEVICE)
    with guarded() as guard:
        made = [x.new_empty(2, 3), x.new_empty((2, 3)), torch.empty_like(x), torch.empty(4, device=DEVICE)]
        made += [x.new_empty(x.shape, dtype=torch.float16), torch.empty((2, 2), dtype=torch.bfloat16, device=DEVICE)]
        made += [x.new_empty(()), x.new_empty(0), x.new_empty(3, 0)]
    assert [tuple(t.shape) for t in made] == [(2, 3), (2, 3), (3,), (4,), (3,), (2, 2), (), (0,), (3, 0)]
    assert all(t.isnan().all() and guard.owns(t) for t in made)
    assert all(t.is_contiguous() and not t._is_view() for t in made)
    assert not x.new_empty(3).isnan().all() or not guard.owns(x.new_empty(3))


def test_small_tables_mean_many_blocks_and_end() -> None:
    grids: list[tuple[int, ...]] = []
    real = library.launch

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        grids.append(grid)
        real(kernel, grid, *arguments, **options)

    x, weight = torch.ones(7, 17, device=DEVICE), torch.ones(17, device=DEVICE)
    for context in (small_tables(), guarded()):
        with context, replaced("launch", launch):
            rms_norm(x, weight, 1e-5, backend="triton")
            gated.gated_activation(x[:, :16], "silu", backend="triton")
    assert grids == [(4,), (4,), (1,), (1,)]


def test_the_rule_of_two() -> None:
    expected = torch.zeros(3, dtype=torch.float64)
    errors = [torch.full((3,), e) for e in (1.0, 2.0, 2.1)]
    assert_as_good_as_torch(errors[1], errors[0], expected, 0.0)
    with pytest.raises(AssertionError, match=r"error 2\.10e"):
        assert_as_good_as_torch(errors[2], errors[0], expected, 0.05)
    with pytest.raises(AssertionError, match="error nan"):
        assert_as_good_as_torch(errors[0] * torch.nan, errors[0], expected, 0.05)


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_a_small_mistake_is_not_near(wrong: str) -> None:
    case = CASES["rms_norm"]
    inputs = case.inputs(3, 17, torch.float32)
    ours = evaluate(case.torchs, inputs, case.trained)
    expected = exact(case.torchs, inputs, case.trained, ours.cotangents)
    assert_near(ours, expected, 1e-5)
    spoilt = (ours.outputs if wrong == "output" else ours.gradients)[0]
    spoilt.view(-1)[spoilt.abs().argmax()] *= 1 + 1e-4
    with pytest.raises(AssertionError, match=wrong):
        assert_near(ours, expected, 1e-5)
