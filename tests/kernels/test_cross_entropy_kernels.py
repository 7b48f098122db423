"""The cross entropy's kernels: losses and gradients of slices against F.cross_entropy, and everything extreme."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tpformer_kernels as ops
from tests.kernels.cases import gradient, slice_and_weights, statistics
from tests.kernels.support import DEVICE, close, guarded, replaced, small_tables
from tpformer_kernels import ELSEWHERE, IGNORED, Backend, library

EXACT = 1e-6
BACKENDS: list[Backend] = ["triton", "torch"]
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
BOTH = pytest.mark.parametrize("backend", BACKENDS)

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def stats_of(logits: Tensor, targets: Tensor, columns: int | None = None, **options: Any) -> Tensor:
    """The statistics with the sum, computed in guarded memory."""
    width = logits.shape[1] if columns is None else columns
    with guarded() as guard:
        return ops.cross_entropy_statistics(guard.copy(logits), guard.copy(targets), width, True, **options)


def grad_of(logits: Tensor, *others: Tensor, columns: int | None = None, **options: Any) -> Tensor:
    """The gradient by targets, lse, a, b and c, computed in guarded memory."""
    width = logits.shape[1] if columns is None else columns
    with guarded() as guard:
        x, targets, lse, a, b, c = (guard.copy(t) for t in (logits, *others))
        y = ops.cross_entropy_gradient(x, targets, width, lse, (a, b, c), **options)
    inplace = options.get("inplace", False)
    assert (y is x) is inplace
    assert inplace or logits.isnan().any() or torch.equal(x, logits)
    return y


def inputs_of(rows: int, width: int) -> tuple[Tensor, ...]:
    """fp32 logits, targets, lse, a, b and c."""
    made = slice_and_weights(rows, width)
    return tuple(x.to(DEVICE, torch.float32 if x.is_floating_point() else x.dtype) for x in made)


def sliced(logits: Tensor, targets: Tensor, width: int) -> list[tuple[Tensor, Tensor]]:
    """The slices of a vocabulary, and the targets as each sees them."""
    slices = []
    for start in range(0, logits.shape[1], width):
        part = logits[:, start : start + width]
        here = (targets >= start) & (targets < start + part.shape[1])
        local = torch.where(here, targets - start, ELSEWHERE)
        slices.append((part, local.where(targets != IGNORED, IGNORED)))
    return slices


def combined(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Log of the sum over all slices, and the target's logit."""
    stats = torch.stack(parts).double()
    lse = (stats[..., 0] + stats[..., 1].log()).logsumexp(0)
    return lse, stats[..., 2].sum(0)


@FLOATS
@BOTH
@pytest.mark.parametrize(("vocabulary", "width"), [(2, 1), (33, 33), (97, 32), (1000, 999)])
def test_loss_and_gradient_of_slices_are_torch_s(
    vocabulary: int, width: int, backend: Backend, dtype: torch.dtype
) -> None:
    logits = (3 * torch.randn(6, vocabulary, device=DEVICE)).to(dtype)
    targets = torch.randint(vocabulary, (6,), device=DEVICE)
    targets[3], share = IGNORED, torch.rand(6, device=DEVICE)
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected, wide, share.double())
    slices = sliced(logits, targets, width)
    lse, picked = combined([stats_of(*part, backend=backend) for part in slices])
    close((lse - picked).where(targets != IGNORED, 0.0), expected, EXACT)
    weights = (lse.float(), share, share, torch.zeros_like(share))
    ours = torch.cat([grad_of(*part, *weights, backend=backend) for part in slices], 1)
    assert ours.dtype == dtype
    close(ours, expected_gradient, EXACT if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("width", [1, 16, 17, 65])
def test_odd_widths_and_caps(width: int, softcap: float, inplace: bool) -> None:
    inputs = inputs_of(5, width)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    for context in (small_tables, guarded):
        with context():
            stats = stats_of(inputs[0], inputs[1], softcap=softcap, backend="triton")
            ours = grad_of(*inputs, softcap=softcap, inplace=inplace, backend="triton")
        close(stats, statistics(*wide[:2], softcap=softcap), EXACT)
        close(ours, gradient(*wide, softcap=softcap), EXACT)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("width", [40000, 70001])
def test_few_rows_are_split(rows: int, width: int) -> None:
    logits, targets = torch.randn(rows, width, device=DEVICE), torch.tensor([width - 1, 17, ELSEWHERE])[:rows]
    targets = targets.to(DEVICE)
    grids: list[tuple[int, ...]] = []
    real = library.launch

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        grids.append(grid)
        real(kernel, grid, *arguments, **options)

    with replaced("launch", launch):
        stats = stats_of(logits, targets, backend="triton")
    assert grids[0][0] == rows and grids[0][1] > 1
    close(stats, statistics(logits.double(), targets), EXACT)


def test_a_target_is_found_by_one_part_only() -> None:
    logits = torch.randn(1, 70, device=DEVICE)
    with small_tables():
        picked = [
            ops.cross_entropy_statistics(logits, torch.tensor([i], device=DEVICE), 70, False, backend="triton")[0, 2]
            for i in range(70)
        ]
    assert torch.equal(torch.stack(picked), logits[0])


@BOTH
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("columns", [0, 1, 16, 20, 32])
@pytest.mark.parametrize("inplace", [False, True])
def test_padding_takes_no_part(backend: Backend, garbage: float, columns: int, inplace: bool) -> None:
    logits, targets, lse, *abc = inputs_of(4, 35)
    logits[:, columns:] = garbage
    targets = torch.tensor([columns - 1, ELSEWHERE, IGNORED, 0 if columns else ELSEWHERE], device=DEVICE)
    with small_tables():
        stats = stats_of(logits, targets, columns, backend=backend)
        ours = grad_of(logits, targets, lse, *abc, columns=columns, inplace=inplace, backend=backend)
    real = logits[:, :columns].double()
    nothing = torch.tensor([[-torch.inf, 0.0, 0.0, 0.0]], device=DEVICE).expand(4, 4).clone()
    nothing[2] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    close(stats, statistics(real, targets) if columns else nothing.double(), EXACT)
    assert torch.equal(ours[:, columns:], torch.zeros_like(ours[:, columns:]))
    close(ours[:, :columns], gradient(real, targets, lse.double(), *(w.double() for w in abc)), EXACT)


@FLOATS
@BOTH
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_extreme_logits(backend: Backend, softcap: float, dtype: torch.dtype) -> None:
    logits = torch.randn(6, 35, device=DEVICE).to(dtype)
    logits[0, ::2], logits[1, ::2], logits[2] = 1e4, -1e4, 1e4
    logits[3, 0], logits[4, 1:], logits[5, 34] = 1e4, -1e4, -1e4
    targets = torch.tensor([1, 0, 34, 0, 0, 34], device=DEVICE)
    x = logits.double() if not softcap else softcap * torch.tanh(logits.double() / softcap)
    for context in (small_tables, guarded):
        with context():
            stats = stats_of(logits, targets, softcap=softcap, backend=backend)
        lse, picked = combined([stats])
        close(lse - picked, F.cross_entropy(x, targets, reduction="none"), EXACT)
        ones = torch.ones(6, device=DEVICE)
        with context():
            ours = grad_of(logits, targets, lse.float(), ones, ones, 0 * ones, softcap=softcap, backend=backend)
        one, zero = ones.double(), 0 * ones.double()
        expected = gradient(logits.double(), targets, x.logsumexp(-1), one, one, zero, softcap=softcap)
        close(ours, expected, 1e-3 if not softcap else 1e-5 if dtype == torch.float32 else 2e-3)


@BOTH
def test_logits_of_minus_infinity(backend: Backend) -> None:
    logits, targets = torch.randn(4, 40, device=DEVICE), torch.tensor([0, 39, 20, ELSEWHERE], device=DEVICE)
    logits[0, 1:], logits[1, :32], logits[2, ::3], logits[3] = -torch.inf, -torch.inf, -torch.inf, -torch.inf
    logits[2, 20] = 1.0
    for context in (small_tables, guarded):
        with context():
            stats = stats_of(logits, targets, backend=backend)
            weights = torch.rand(4, 4, device=DEVICE)
            ours = grad_of(logits, targets, *weights, backend=backend)
        x = logits.double()
        assert torch.equal(stats[:, 0], logits.amax(1)) and torch.equal(
            stats[3, :2].cpu(), torch.tensor([-torch.inf, 0.0])
        )
        close(stats[:3, 0] + stats[:3, 1].log(), x[:3].logsumexp(1), EXACT)
        assert torch.equal(stats[:, 3], torch.full((4,), -torch.inf, device=DEVICE))
        close(ours, gradient(x, targets, *weights.double()), EXACT)


@BOTH
@pytest.mark.parametrize("inplace", [False, True])
def test_all_ignored(backend: Backend, inplace: bool) -> None:
    logits, targets = torch.full((3, 40), torch.nan, device=DEVICE), torch.full((3,), IGNORED, device=DEVICE)
    nan = torch.full((3,), torch.nan, device=DEVICE)
    with small_tables():
        stats = stats_of(logits, targets, backend=backend)
        ours = grad_of(logits, targets, nan, nan, nan, nan, inplace=inplace, backend=backend)
    assert torch.equal(stats.cpu(), torch.tensor([[0.0, 1.0, 0.0, 0.0]]).expand(3, 4))
    assert torch.equal(ours, torch.zeros_like(ours))


@pytest.mark.parametrize("with_sum", [True, False])
@pytest.mark.parametrize("integers", [torch.int64, torch.int32], ids=str)
def test_with_and_without_the_sum_and_of_any_integers(with_sum: bool, integers: torch.dtype) -> None:
    logits, targets = torch.randn(3, 40, device=DEVICE), torch.tensor([3, ELSEWHERE, IGNORED], device=DEVICE)
    with small_tables():
        stats = ops.cross_entropy_statistics(logits, targets.to(integers), 40, with_sum, backend="triton")
    assert stats.shape == (3, 4 if with_sum else 3) and stats.is_contiguous()
    close(stats, statistics(logits.double(), targets)[:, : stats.shape[1]], EXACT)


def test_in_place_rows_may_lie_apart_but_not_their_numbers() -> None:
    inputs = inputs_of(4, 35)
    logits, targets, lse, *abc = inputs
    expected = gradient(*(x.double() if x.is_floating_point() else x for x in inputs))
    around = torch.full((4, 50), 7.0, device=DEVICE)
    around[:, 5:40] = logits
    ours = ops.cross_entropy_gradient(around[:, 5:40], targets, 35, lse, tuple(abc), inplace=True, backend="triton")  # type: ignore[arg-type]
    close(ours, expected, EXACT)
    assert ours.data_ptr() == around[:, 5:].data_ptr()
    assert around[:, :5].eq(7).all() and around[:, 40:].eq(7).all()
    with pytest.raises(ValueError, match=r"must be contiguous, not of stride \(1, 4\)"):
        apart = logits.t().contiguous().t()
        ops.cross_entropy_gradient(apart, targets, 35, lse, tuple(abc), inplace=True, backend="triton")  # type: ignore[arg-type]
