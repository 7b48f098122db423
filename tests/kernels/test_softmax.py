"""Softmax where torch's has no counterpart: masks that broadcast, rows that see nothing, what must not be read."""

import pytest
import torch
from torch import Tensor

from tests.kernels.support import DEVICE, small_tables
from tpformer_kernels import Backend, softmax

BACKENDS = ["triton", "torch"]
MASKS = [(6,), (5, 1), (5, 6), (3, 1, 1), (1, 5, 6), (2, 1, 1, 6), (2, 3, 5, 6), ()]


def scores(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("boolean", [True, False])
def test_a_mask_broadcasts(shape: tuple[int, ...], boolean: bool, backend: Backend) -> None:
    x, mask = scores(2, 3, 5, 6), scores(*shape)
    with small_tables():
        y = softmax(x, scale=2.0, mask=mask > -0.5 if boolean else mask, backend=backend)
    added = torch.where(mask > -0.5, 0.0, -1e9) if boolean else mask
    expected = torch.softmax(2.0 * x + added, -1).where(2.0 * x + added > -1e8, 0.0)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [6, 40])
def test_a_row_that_sees_nothing_is_zero_and_gets_no_gradient(columns: int, backend: Backend) -> None:
    """More queries than keys: the first ones see no key; another is masked; one is -inf throughout."""
    x = scores(2, columns + 3, columns)
    x[0, 5] = -torch.inf
    x.requires_grad_()
    mask = torch.ones(columns + 3, 1, dtype=torch.bool, device=DEVICE)
    mask[7] = False
    with small_tables():
        y = softmax(x, causal=True, mask=mask, backend=backend)
        y.backward(scores(*y.shape))
    assert x.grad is not None and torch.isfinite(y).all() and torch.isfinite(x.grad).all()
    for blind in ((slice(None), slice(0, 3)), (slice(None), 7), (0, 5)):
        assert (y[blind] == 0).all() and (x.grad[blind] == 0).all()
    torch.testing.assert_close(y[1, 8:].sum(-1), torch.ones(columns - 5, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [7, 40])
def test_what_is_not_seen_is_not_looked_at(columns: int, backend: Backend) -> None:
    """NaN beyond the diagonal, in scores and in the gradient, changes nothing."""
    clean, dy = scores(3, 5, columns), scores(3, 5, columns)
    beyond = ~torch.ones(5, columns, dtype=torch.bool, device=DEVICE).tril(columns - 5)
    found = []
    for poison in (0.0, torch.nan):
        x = clean.masked_fill(beyond, poison).requires_grad_()
        with small_tables():
            y = softmax(x, causal=True, backend=backend)
            # in plain torch, 0 · NaN is NaN
            y.backward(dy.masked_fill(beyond, poison) if backend == "triton" else dy)
        assert x.grad is not None
        found.append((y.detach(), x.grad))
    for clear, poisoned in zip(*found, strict=True):
        assert torch.equal(clear, poisoned)


@pytest.mark.filterwarnings("ignore:overflow encountered in subtract:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend: Backend) -> None:
    x = torch.tensor([[1e4, -1e4, 9e3], [-3e38, 3e38, 0.0]], device=DEVICE)
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], device=DEVICE)
    assert torch.equal(softmax(x, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_masks_are_refused(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"mask \(4,\) must broadcast to x \(2, 3\)"):
        softmax(scores(2, 3), mask=scores(4), backend=backend)
    with pytest.raises(ValueError, match="gets no gradient"):
        softmax(scores(2, 3), mask=scores(3).requires_grad_(), backend=backend)
    with pytest.raises(ValueError, match=r"x \(3,\) must be"):
        softmax(scores(3), backend=backend)
