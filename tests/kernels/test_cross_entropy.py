"""The reference of the cross entropy's two passes on one slice, against logsumexp, softmax and autograd."""

import pytest
import torch
from torch import Tensor

from tpformer_kernels import ELSEWHERE, cross_entropy_gradient, cross_entropy_statistics
from tpformer_kernels import cross_entropy as module

SIZES = [(1, 1), (1, 8), (5, 1), (4, 15), (3, 16), (7, 17), (300, 33)]


def make(rows: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits and targets of a slice; every third target lies in another slice."""
    logits, targets = 3 * torch.randn(rows, width, dtype=dtype), torch.randint(width, (rows,))
    return logits, targets.where(torch.arange(rows) % 3 < 2, ELSEWHERE)


def weights_of(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = torch.randn(3, rows, dtype=dtype).unbind()
    return a, b, c


def exact_gradient(logits: Tensor, targets: Tensor, lse: Tensor, weights: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """a·exp(x - lse) - c - b·onehot, in fp64."""
    a, b, c = (w.double().unsqueeze(1) for w in weights)
    onehot = torch.zeros(logits.shape, dtype=torch.float64)
    onehot[targets >= 0, targets[targets >= 0]] = 1.0
    return a * (logits.double() - lse.double().unsqueeze(1)).exp() - c - b * onehot


@pytest.mark.parametrize(("rows", "width"), SIZES)
@pytest.mark.parametrize("with_sum", [False, True])
def test_statistics(rows: int, width: int, with_sum: bool) -> None:
    logits, targets = make(rows, width)
    stats = cross_entropy_statistics(logits, targets, width, with_sum)
    assert stats.shape == (rows, 4 if with_sum else 3)
    assert torch.equal(stats[:, 0], logits.amax(-1))
    torch.testing.assert_close(stats[:, 1].log() + stats[:, 0], logits.logsumexp(-1), rtol=1e-12, atol=1e-12)
    chosen = torch.stack([row[t] if t >= 0 else torch.zeros(()) for row, t in zip(logits, targets, strict=True)])
    assert torch.equal(stats[:, 2], chosen.double())
    if with_sum:
        torch.testing.assert_close(stats[:, 3], logits.sum(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "width"), SIZES)
@pytest.mark.parametrize("inplace", [False, True])
def test_gradient(rows: int, width: int, inplace: bool) -> None:
    logits, targets = make(rows, width)
    lse, weights = logits.logsumexp(-1) + torch.rand(rows, dtype=torch.float64), weights_of(rows)
    expected = exact_gradient(logits, targets, lse, weights)
    before = logits.clone()
    out = cross_entropy_gradient(logits, targets, width, lse, weights, inplace=inplace)
    assert (out is logits) is inplace
    assert inplace or torch.equal(logits, before)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_the_formula_of_the_gradient_is_autograd_s() -> None:
    logits, targets = make(6, 11)
    targets = targets.clamp(min=0)
    logits.requires_grad_()
    smoothing, z, share = 0.2, 0.05, torch.rand(6, dtype=torch.float64)
    lse = logits.logsumexp(-1)
    picked = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    loss = lse - (1 - smoothing) * picked - smoothing / 11 * logits.sum(-1) + z * lse.square()
    (expected,) = torch.autograd.grad(loss, logits, share)
    lse = lse.detach()
    weights = (share * (1 + 2 * z * lse), share * (1 - smoothing), share * smoothing / 11)
    ours = cross_entropy_gradient(logits.detach(), targets, 11, lse, weights)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("columns", [0, 1, 7])
def test_padding_takes_no_part(garbage: float, columns: int) -> None:
    logits, _ = make(5, 9)
    logits[:, columns:] = garbage
    targets = torch.full((5,), columns - 1)  # -1: in another slice
    stats = cross_entropy_statistics(logits, targets, columns, True)
    real = logits[:, :columns]
    if columns:
        torch.testing.assert_close(stats[:, 1].log() + stats[:, 0], real.logsumexp(-1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stats[:, 3], real.sum(-1), rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(stats, torch.tensor([[-torch.inf, 0.0, 0.0, 0.0]]).double().expand(5, 4))
    lse, weights = torch.zeros(5, dtype=torch.float64), weights_of(5)
    out = cross_entropy_gradient(logits, targets, columns, lse, weights)
    assert torch.equal(out[:, columns:], torch.zeros(5, 9 - columns, dtype=torch.float64))
    torch.testing.assert_close(out[:, :columns], exact_gradient(logits, targets, lse, weights)[:, :columns])


@pytest.mark.parametrize("inplace", [False, True])
def test_bf16_logits_are_read_in_fp32(inplace: bool) -> None:
    logits, targets = make(6, 37, torch.bfloat16)
    targets = targets.clamp(max=32)
    stats = cross_entropy_statistics(logits, targets, 33, True)
    assert stats.dtype == torch.float32
    torch.testing.assert_close(
        (stats[:, 1].log() + stats[:, 0]).double(), logits[:, :33].double().logsumexp(-1), rtol=1e-6, atol=1e-6
    )
    lse, weights = logits[:, :33].float().logsumexp(-1), weights_of(6, torch.float32)
    expected = exact_gradient(logits[:, :33], targets, lse, weights)
    out = cross_entropy_gradient(logits, targets, 33, lse, weights, inplace=inplace)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out[:, :33].double(), expected, rtol=2**-8, atol=1e-6)  # one rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_chunks_of_rows_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = make(11, 13, dtype)
    targets = targets.clamp(max=11)
    wide = torch.promote_types(dtype, torch.float32)
    lse, weights = logits.to(wide).logsumexp(-1), weights_of(11, wide)

    def both() -> list[Tensor]:
        gradient = cross_entropy_gradient(logits, targets, 12, lse, weights)
        return [cross_entropy_statistics(logits, targets, 12, True), gradient]

    whole = both()
    monkeypatch.setattr(module, "_chunks", lambda logits: (slice(i, i + 3) for i in range(0, len(logits), 3)))
    for chunked, expected in zip(both(), whole, strict=True):
        torch.testing.assert_close(chunked, expected, rtol=1e-6, atol=0)


def test_the_chunks_cover_every_row_once() -> None:
    covered = [row for part in module._chunks(torch.empty(1000, 4099)) for row in range(1000)[part]]
    assert covered == list(range(1000))
    assert len(list(module._chunks(torch.empty(1000, 4099)))) > 1


def test_strided_logits() -> None:
    logits, targets = make(9, 7)
    strided = logits.t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(
        cross_entropy_statistics(strided, targets, 7, True)[:, [0, 2]],
        cross_entropy_statistics(logits, targets, 7, True)[:, [0, 2]],
    )
    lse, weights = logits.logsumexp(-1), weights_of(9)
    expected = exact_gradient(logits, targets, lse, weights)
    for inplace in (False, True):
        out = cross_entropy_gradient(strided, targets, 7, lse, weights, inplace=inplace)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
