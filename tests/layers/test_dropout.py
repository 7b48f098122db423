"""Dropout masks: the same at any layout and backend, slices of the mask of the bigger batch, of the right rate."""

from dataclasses import replace
from typing import Any

import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.distributed import Ranks
from tests.layers.prove import BACKENDS, gradient, meshes, noise, take, whole
from tpformer import Key, Mesh
from tpformer.layers.dropout import check_dropout, residual_dropout
from tpformer_kernels import AttentionOptions, Backend, attention

B, S, D, H = 3, 8, 5, 8
P = 0.3
KEY = Key(9, sample=2)


def attention_dropout(shape: tuple[int, ...], p: float, key: Key, first_head: int) -> Tensor:
    """Dropout of probabilities (b, heads, q, k) that are all 1: attention to k values, each a unit vector."""
    samples, heads, queries, keys = shape
    zeros = torch.zeros(samples, heads, max(queries, keys), keys).double()
    options = AttentionOptions(dropout=p, place=(key.seed, key.sample, first_head))
    values = keys * torch.eye(keys).double().expand(samples, heads, keys, keys)
    return attention(zeros[:, :, :queries], zeros[:, :, :keys], values, options)


def run_residual(backend: Backend, name: str, with_residual: bool) -> dict[str, npt.NDArray[Any]]:
    """The whole y, dx and, with one, the residual's gradient, in each layout."""
    results = {}
    for layout, mesh in meshes().items():
        parts = [
            take(noise(part, B, S, D), "tokens", mesh).to(getattr(torch, name)) for part in ("x", "residual", "dy")
        ]
        x, residual, dy = (part.detach().requires_grad_() for part in parts)
        y = residual_dropout(x, residual if with_residual else None, P, KEY, mesh, backend=backend)
        y.backward(dy.detach())
        found = [y.detach(), gradient(x), *([gradient(residual)] if with_residual else [])]
        results[layout] = torch.stack([whole(t, "tokens", mesh) for t in found]).numpy()
    return results


# triton computes in fp32 at most; a number that is dropped is 0 in either, so that the masks are compared bit for bit
TOLERANCE: dict[Backend, tuple[str, float]] = {"torch": ("float64", 1e-12), "triton": ("float32", 1e-6)}


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_mask_is_the_same_at_any_layout_and_backend(
    ranks: Ranks, backend: Backend, with_residual: bool
) -> None:
    name, tolerance = TOLERANCE[backend]
    kept = residual_dropout(torch.ones(B, S, D), None, P, KEY, Mesh(), backend="torch") != 0
    y, dx = (noise(part, B, S, D) * kept / (1 - P) for part in ("x", "dy"))
    expected = [y + noise("residual", B, S, D), dx, noise("dy", B, S, D)] if with_residual else [y, dx]
    for results in [run_residual(backend, name, with_residual), *ranks(run_residual, 4, backend, name, with_residual)]:
        for layout, result in results.items():
            found = torch.from_numpy(result)
            torch.testing.assert_close(
                found.double(), torch.stack(expected), rtol=tolerance, atol=tolerance * with_residual, msg=layout
            )
            assert torch.equal(found[1] == 0, ~kept), layout
    assert 0.5 < kept.float().mean() < 0.9


def test_attention_mask_of_some_heads_is_a_slice_of_that_of_all() -> None:
    expected = attention_dropout((B, H, S, S + 3), P, KEY, first_head=0)
    for tp in (2, 4):
        parts = [attention_dropout((B, H // tp, S, S + 3), P, KEY, first_head=r * H // tp) for r in range(tp)]
        assert torch.equal(torch.cat(parts, dim=1), expected)
        assert not torch.equal(parts[0], parts[1])


@pytest.mark.parametrize("kind", ["residual", "attention"])
def test_replicas_draw_slices_of_the_mask_of_the_whole_batch(kind: str) -> None:
    def mask(samples: int, first: int) -> Tensor:
        key = replace(KEY, sample=first)
        if kind == "residual":
            return residual_dropout(torch.ones(samples, S, D), None, P, key, Mesh())
        return attention_dropout((samples, H, S, S), P, key, 0)

    batch = mask(6, 10)
    assert torch.equal(torch.cat([mask(2, 10), mask(3, 12), mask(1, 15)]), batch)
    assert not torch.equal(mask(6, 11), batch)
    assert len({tuple(sample.flatten().tolist()) for sample in batch}) == 6


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(p: float) -> None:
    """Within 5 standard deviations, along every dim too; the expected value is kept."""
    x = residual_dropout(torch.ones(16, 32, 64, dtype=torch.float64), None, p, Key(3), Mesh())
    y = attention_dropout((8, 8, 16, 32), p, Key(3), 0)
    for drawn in (x, y):
        dropped = (drawn == 0).double()
        assert set(drawn.unique().tolist()) == {0.0, 1 / (1 - p)}
        assert abs(dropped.mean() - p) < 5 * (p * (1 - p) / dropped.numel()) ** 0.5
        for dim in range(drawn.dim()):
            rates = dropped.movedim(dim, 0).flatten(1).mean(dim=1)
            bound = 5 * (p * (1 - p) * drawn.shape[dim] / dropped.numel()) ** 0.5
            assert (rates - p).abs().max() < bound


def test_neighbours_are_independent() -> None:
    """No correlation between the masks of neighbouring features, positions, samples and keys."""
    p = 0.5
    mask = residual_dropout(torch.ones(16, 32, 64), None, p, Key(3), Mesh())
    other = residual_dropout(torch.ones(16, 32, 64), None, p, Key(4), Mesh())
    pairs = [(mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]), (mask[..., 1:], mask[..., :-1]), (mask, other)]
    pairs += [(mask[..., k:], mask[..., :-k]) for k in (2, 3, 4)]
    for a, b in pairs:
        agreement = (a == b).double().mean()
        assert abs(agreement - 0.5) < 5 * 0.5 / a.numel() ** 0.5


def test_none_without_a_key_or_a_rate() -> None:
    x, residual = noise("x", B, S, D), noise("residual", B, S, D)
    for p, key in ((P, None), (0.0, KEY)):
        assert residual_dropout(x, None, p, key, Mesh()) is x
        assert torch.equal(residual_dropout(x, residual, p, key, Mesh()), residual + x)
    assert (attention_dropout((B, H, S, S), 0.0, KEY, 0) == 1).all()


def test_dropped_infinities_are_zero_and_dtypes_stay() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.full((B, S, D), torch.inf, dtype=dtype)
        y = residual_dropout(x, None, P, KEY, Mesh())
        assert y.dtype == dtype
        assert set(y.unique().tolist()) == {0.0, float("inf")}
        wider = residual_dropout(x, torch.ones(B, S, D), P, KEY, Mesh())  # the residual stream's dtype wins
        assert wider.dtype == torch.float32
        assert set(wider.unique().tolist()) == {1.0, float("inf")}


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_wrong_rates_are_named(p: float) -> None:
    with pytest.raises(ValueError, match=rf"attention_dropout \({p}\) must be at least 0 and below 1"):
        check_dropout(p, "attention_dropout")


def test_right_rates_pass() -> None:
    for p in (0.0, 0.5, 0.999):
        check_dropout(p)
