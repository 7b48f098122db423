"""Dropout masks: the same at any layout, slices of the mask of the bigger batch, and of the right rate."""

from dataclasses import replace
from typing import Any

import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.distributed import Ranks
from tests.layers.prove import gradient, meshes, noise, take, whole
from tpformer import Key, Mesh
from tpformer.layers.dropout import attention_dropout, check_dropout, residual_dropout

B, S, D, H = 3, 8, 5, 8
P = 0.3
KEY = Key(9, sample=2)


def run_residual() -> dict[str, npt.NDArray[Any]]:
    results = {}
    for layout, mesh in meshes().items():
        x = take(noise("x", B, S, D), "tokens", mesh).detach().requires_grad_()
        y = residual_dropout(x, P, KEY, mesh)
        y.backward(take(noise("dy", B, S, D), "tokens", mesh))
        results[layout] = torch.stack([whole(t, "tokens", mesh) for t in (y.detach(), gradient(x))]).numpy()
    return results


def test_residual_mask_is_the_same_at_any_layout(ranks: Ranks) -> None:
    kept = residual_dropout(torch.ones(B, S, D), P, KEY, Mesh()) != 0
    expected = torch.stack([noise(name, B, S, D) * kept / (1 - P) for name in ("x", "dy")])
    for results in [run_residual(), *ranks(run_residual, 4)]:
        for layout, result in results.items():
            torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-12, atol=0, msg=layout)
    assert 0.5 < kept.float().mean() < 0.9


def test_attention_mask_of_some_heads_is_a_slice_of_that_of_all() -> None:
    ones = torch.ones(B, H, S, S + 3)
    expected = attention_dropout(ones, P, KEY, first_head=0)
    for tp in (2, 4):
        parts = [
            attention_dropout(part, P, KEY, first_head=r * H // tp) for r, part in enumerate(ones.chunk(tp, dim=1))
        ]
        assert torch.equal(torch.cat(parts, dim=1), expected)
        assert not torch.equal(parts[0], parts[1])


@pytest.mark.parametrize("kind", ["residual", "attention"])
def test_replicas_draw_slices_of_the_mask_of_the_whole_batch(kind: str) -> None:
    def mask(samples: int, first: int) -> Tensor:
        key = replace(KEY, sample=first)
        if kind == "residual":
            return residual_dropout(torch.ones(samples, S, D), P, key, Mesh())
        return attention_dropout(torch.ones(samples, H, S, S), P, key, 0)

    batch = mask(6, 10)
    assert torch.equal(torch.cat([mask(2, 10), mask(3, 12), mask(1, 15)]), batch)
    assert not torch.equal(mask(6, 11), batch)
    assert len({tuple(sample.flatten().tolist()) for sample in batch}) == 6


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(p: float) -> None:
    """Within 5 standard deviations, along every dim too; the expected value is kept."""
    x = residual_dropout(torch.ones(16, 32, 64, dtype=torch.float64), p, Key(3), Mesh())
    y = attention_dropout(torch.ones(8, 8, 16, 32, dtype=torch.float64), p, Key(3), 0)
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
    mask = residual_dropout(torch.ones(16, 32, 64), p, Key(3), Mesh())
    other = residual_dropout(torch.ones(16, 32, 64), p, Key(4), Mesh())
    pairs = [(mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]), (mask[..., 1:], mask[..., :-1]), (mask, other)]
    pairs += [(mask[..., k:], mask[..., :-k]) for k in (2, 3, 4)]
    for a, b in pairs:
        agreement = (a == b).double().mean()
        assert abs(agreement - 0.5) < 5 * 0.5 / a.numel() ** 0.5


def test_none_without_a_key_or_a_rate() -> None:
    x = noise("x", B, S, D)
    assert residual_dropout(x, P, None, Mesh()) is x
    assert residual_dropout(x, 0.0, KEY, Mesh()) is x
    probabilities = noise("p", B, H, S, S)
    assert attention_dropout(probabilities, P, None, 0) is probabilities
    assert attention_dropout(probabilities, 0.0, KEY, 0) is probabilities


def test_dropped_infinities_are_zero_and_dtypes_stay() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        y = residual_dropout(torch.full((B, S, D), torch.inf, dtype=dtype), P, KEY, Mesh())
        assert y.dtype == dtype
        assert set(y.unique().tolist()) == {0.0, float("inf")}


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_wrong_rates_are_named(p: float) -> None:
    with pytest.raises(ValueError, match=rf"attention_dropout \({p}\) must be at least 0 and below 1"):
        check_dropout(p, "attention_dropout")


def test_right_rates_pass() -> None:
    for p in (0.0, 0.5, 0.999):
        check_dropout(p)
