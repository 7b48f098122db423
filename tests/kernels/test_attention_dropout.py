"""Attention's dropout: the mask is a function of global positions, whoever draws it, and in whichever tiles."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.attention_cases import PLACE
from tests.kernels.support import DEVICE, small_tables
from tpformer_kernels import AttentionOptions, attention, random_columns

P = 0.3
OPTIONS = AttentionOptions(dropout=P, place=PLACE)
BACKENDS = ["triton", "torch"]


def mask(
    options: AttentionOptions, backend: Any, b: int = 2, heads: int = 4, queries: int = 19, keys: int = 37
) -> Tensor:
    """What of each head's probabilities is kept: its values are unit vectors, and its scores equal."""
    q, k = torch.zeros(b, heads, queries, keys, device=DEVICE), torch.zeros(b, 1, keys, keys, device=DEVICE)
    y = attention(q, k, torch.eye(keys, device=DEVICE).expand_as(k), options, backend=backend)
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (keys * (1 - P))), rtol=1e-6, atol=0)
    return y != 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("small", [True, False])
def test_its_words_are_philox_s_of_each_place(small: bool, backend: Any) -> None:
    seed, sample, head = PLACE
    words = random_columns(
        seed,
        (torch.arange(19), sample + torch.arange(2).view(-1, 1, 1), head + torch.arange(4).view(-1, 1)),
        0,
        37,
    )
    if small:
        with small_tables():
            drawn = mask(OPTIONS, backend)
    else:
        drawn = mask(OPTIONS, backend)
    assert torch.equal(drawn.cpu(), words >= round(P * 2**32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_and_samples_draw_their_part_of_the_whole(backend: Any) -> None:
    seed, sample, head = PLACE
    whole = mask(OPTIONS, backend)
    for tp in (2, 4):
        parts = [
            mask(replace(OPTIONS, place=(seed, sample, head + r * 4 // tp)), backend, heads=4 // tp) for r in range(tp)
        ]
        assert torch.equal(torch.cat(parts, 1), whole)
    parts = [mask(replace(OPTIONS, place=(seed, sample + i, head)), backend, b=1) for i in range(2)]
    assert torch.equal(torch.cat(parts), whole)
    # negative control: with the head's or the sample's number left out, parts repeat each other
    again = [mask(OPTIONS, backend, heads=2) for _ in range(2)]
    assert not torch.equal(torch.cat(again, 1), whole)


def test_seeds_differ_in_every_bit_that_counts() -> None:
    """Also in the upper half of the 64 bits."""
    masks = [mask(replace(OPTIONS, place=(seed, 0, 0)), "triton", 1, 1) for seed in (1, 2, 1 << 33, 1 << 63)]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_has_the_mask_of_forward(backend: Any) -> None:
    """dv is the kept probabilities' sum over queries; a gradient of another mask would not be."""
    v = torch.eye(37, device=DEVICE).expand(1, 1, 37, 37).clone().requires_grad_()
    zeros = torch.zeros(1, 1, 37, 37, device=DEVICE)
    with small_tables():
        y = attention(zeros[:, :, :19], zeros, v, OPTIONS, backend=backend)
        (dv,) = torch.autograd.grad(y.sum(), v)
    torch.testing.assert_close(dv[0, 0, :, 0], y.sum((0, 1, 2)), rtol=1e-5, atol=1e-6)
