"""Dropout draws the same masks on any layout: with a key, loss and gradients are still those of one process."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

import tpformer.layers.attention
import tpformer.layers.dropout
from tests.distributed import Ranks
from tests.proofs.cases import (
    LAYOUTS,
    TOLERANCE,
    Config,
    Layout,
    Measured,
    build_random,
    gpt,
    llama,
    measure_model,
    mismatches,
)
from tpformer import Key, Mesh
from tpformer.layers.dropout import residual_dropout
from tpformer_kernels import AttentionOptions, attention, dropout_add

MODELS: dict[str, Config] = {
    "gpt-residual": gpt(dropout=0.2),
    "gpt-both": gpt(dropout=0.1, attention_dropout=0.3),
    "llama-attention": llama(num_kv_heads=2, attention_dropout=0.2),
    "llama-both-kv1-window": llama(num_kv_heads=1, dropout=0.2, attention_dropout=0.2, sliding_window=5),
}


def dropped(name: str, layout: Layout, seed: int) -> Measured:
    """On a rank: fp64 loss and gradients with dropout."""
    return measure_model(build_random(MODELS[name], layout.mesh(), torch.float64), key=Key(seed))


@lru_cache
def one_process(name: str, seed: int | None) -> Measured:
    """On one process; seed None is no dropout."""
    model = build_random(MODELS[name], Mesh(), torch.float64)
    return measure_model(model, key=None if seed is None else Key(seed))


@pytest.mark.parametrize("layout", LAYOUTS[2:], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_masks_do_not_depend_on_the_layout(name: str, layout: Layout, ranks: Ranks) -> None:
    for found in ranks(dropped, layout.world_size, name, layout, 11):
        assert mismatches(one_process(name, 11), found, TOLERANCE[torch.float64]) == []


@pytest.mark.parametrize("name", MODELS)
def test_a_key_drops_and_another_key_drops_otherwise(name: str) -> None:
    losses = [one_process(name, seed)["loss"] for seed in (None, 11, 12)]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e-3
    assert (
        one_process(name, 11)["loss"]
        == measure_model(build_random(MODELS[name], Mesh(), torch.float64), key=Key(11))["loss"]
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_vanishing_rate_is_no_dropout(name: str) -> None:
    """A key with a rate that drops nothing takes the same way through the model, to the plain results."""
    rates: dict[str, Any] = {rate: 1e-13 for rate in ("dropout", "attention_dropout") if getattr(MODELS[name], rate)}
    model = build_random(replace(MODELS[name], **rates), Mesh(), torch.float64)
    assert mismatches(one_process(name, None), measure_model(model, key=Key(11)), TOLERANCE[torch.float64]) == []


@pytest.mark.parametrize("name", MODELS)
def test_no_two_uses_share_a_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding, and in each layer the attention, what follows it and what follows the MLP: a key for each."""
    seeds = []

    def record_attention(q: Any, k: Any, v: Any, options: AttentionOptions, **others: Any) -> torch.Tensor:
        seeds.extend([options.place[0]] * (options.dropout > 0))
        return attention(q, k, v, options, **others)

    def record_add(x: torch.Tensor, residual: Any, p: float, place: tuple[int, int, int], **options: Any) -> Any:
        seeds.append(place[0])
        return dropout_add(x, residual, p, place, **options)

    monkeypatch.setattr(tpformer.layers.attention, "attention", record_attention)
    monkeypatch.setattr(tpformer.layers.dropout, "dropout_add", record_add)
    model = build_random(MODELS[name], Mesh(), torch.float64)
    model(torch.zeros(1, 4, dtype=torch.int64), key=Key(0))
    c = model.config
    assert len(set(seeds)) == len(seeds) == (c.dropout > 0) * (1 + 2 * 2) + (c.attention_dropout > 0) * 2


@pytest.mark.parametrize("name", ["gpt-residual", "llama-attention"])
def test_each_sample_and_step_has_a_mask_of_its_own(name: str) -> None:
    """The same token sequence twice in a batch gets two masks; so does the next step of the same seed."""
    model = build_random(MODELS[name], Mesh(), torch.float64)
    tokens = torch.arange(8).repeat(2, 1)
    plain = model(tokens)
    assert torch.equal(plain[0], plain[1])
    first, second = model(tokens, key=Key(5)), model(tokens, key=Key(5).fold("step", 1))
    for a, b in ((first[0], first[1]), (first, second), (first, plain)):
        assert not torch.allclose(a, b)
    # the second sample's mask is that of a replica whose batch begins there
    assert torch.allclose(model(tokens[1:], key=Key(5, sample=1))[0], first[1], rtol=0, atol=1e-12)


def test_the_kept_share_and_scale_are_those_of_the_rate() -> None:
    """Mean over many keys of a dropped residual stream: unbiased, and zero as often as the rate says."""
    ones = torch.ones(4, 16, 64, dtype=torch.float64)
    for p in (0.1, 0.5):
        residual = torch.stack([residual_dropout(ones, None, p, Key(seed), Mesh()) for seed in range(20)])
        # equal scores, and values that are unit vectors: the output is each query's probabilities, times 64
        q, k, v = torch.zeros(4, 1, 16, 64), torch.zeros(4, 1, 64, 64), 64 * torch.eye(64).expand(4, 1, 64, 64)
        options = [AttentionOptions(dropout=p, place=(seed, 0, 0)) for seed in range(20)]
        attended = torch.stack([attention(q.double(), k.double(), v.double(), option) for option in options])
        for x in (residual, attended):
            error = (p * (1 - p) / x.numel()) ** 0.5
            assert abs((x == 0).double().mean() - p) < 5 * error
            assert np.allclose(x.unique(), [0, 1 / (1 - p)])
