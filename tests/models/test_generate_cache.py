"""The cache: its logits are those of the whole forward, each row's those of the row alone; what it costs; controls."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.distributed import Ranks
from tests.proofs.cases import TOLERANCE, VARIANTS, Layout, build_random, gpt, llama
from tpformer import Mesh, trace_communication
from tpformer.layers.cache import BlockCache, KVCache
from tpformer.models.generate import _whole_sequences

FP64, FP32 = torch.float64, torch.float32
PROMPT, LENGTH = 6, 11
PADDING = (0, 4, 2)


def batch() -> tuple[Tensor, Tensor]:
    """Tokens (b, LENGTH) and the mask of the prompts, (b, PROMPT)."""
    tokens = torch.randint(101, (len(PADDING), LENGTH), generator=torch.Generator().manual_seed(0))
    return tokens, torch.arange(PROMPT) >= torch.tensor(PADDING).unsqueeze(1)


def cached(model: Any, padded: bool = True, length: int = LENGTH) -> np.ndarray:
    """The logits after the prompt and after each token that follows, (b, LENGTH - PROMPT + 1, vocab)."""
    tokens, mask = batch()
    cache = KVCache(length, mask if padded else None)
    found = []
    with torch.no_grad(), _whole_sequences(model):
        for part in tokens.split([PROMPT] + [1] * (LENGTH - PROMPT), dim=1):
            cache.advance(part.shape[1])
            found.append(model.next_logits(part, cache))
    return torch.stack(found, dim=1).double().numpy()


def whole(model: Any, padded: bool = True) -> np.ndarray:
    """The same, of each row alone and without a cache."""
    tokens, _ = batch()
    with torch.no_grad():
        rows = [model.full_logits(tokens[i : i + 1, padded * pad :]) for i, pad in enumerate(PADDING)]
    return torch.cat([row[:, PROMPT - LENGTH - 1 :] for row in rows]).double().numpy()


@lru_cache
def reference(name: str, dtype: torch.dtype) -> np.ndarray:
    """On one process."""
    return whole(build_random(VARIANTS[name], Mesh(), dtype))


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest one, relative to the largest number."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def cached_on(names: list[str], layout: Layout, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """On a rank."""
    return {name: cached(build_random(VARIANTS[name], layout.mesh(), dtype)) for name in names}


@pytest.mark.parametrize("layout", [Layout(2), Layout(4), Layout(2, 1, True)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_row_is_the_whole_forward_of_the_row_alone(dtype: torch.dtype, layout: Layout, ranks: Ranks) -> None:
    for answer in ranks(cached_on, layout.world_size, list(VARIANTS), layout, dtype):
        for name, found in answer.items():
            assert error(found, reference(name, dtype)) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_on_one_process_too(name: str, padded: bool) -> None:
    model = build_random(VARIANTS[name], Mesh(), FP64)
    assert error(cached(model, padded), whole(model, padded)) <= TOLERANCE[FP64]


@pytest.mark.parametrize("name", ["qwen3-kv2-wide-heads", "mistral-kv2-window", "gpt-tied"])
def test_with_the_kernels_of_triton(name: str) -> None:
    model = build_random(replace(VARIANTS[name], backend="triton"), Mesh(), FP32)
    assert error(cached(model), reference(name, FP32)) <= TOLERANCE[FP32]


@pytest.mark.parametrize("fp32_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_round_no_more_than_without_a_cache(dtype: torch.dtype, fp32_residual: bool) -> None:
    model = build_random(llama(num_kv_heads=2), Mesh(), dtype)
    model.fp32_residual = fp32_residual
    truth = build_random(llama(num_kv_heads=2), Mesh(), FP64)
    for theirs, ours in zip(truth.parameters(), model.parameters(), strict=True):
        theirs.data.copy_(ours.data)
    expected = whole(truth)
    assert error(cached(model), expected) <= 1.5 * error(whole(model), expected)
    tokens = model.generate(batch()[0], max_new_tokens=4, temperature=0.0)
    assert tokens.shape == (3, LENGTH + 4)


# what it holds, and what it costs


def costs(layout: Layout, config: Any) -> tuple[Any, ...]:
    """On a rank: the shapes in the cache; whether they stay; collectives of the prompts and of one token."""
    model = build_random(config, layout.mesh(), FP32)
    tokens, mask = batch()
    cache, counts = KVCache(LENGTH, mask), []
    memory = set()
    with torch.no_grad(), _whole_sequences(model):
        for part in tokens[:, : PROMPT + 2].split([PROMPT, 1, 1], dim=1):
            cache.advance(part.shape[1])
            with trace_communication() as trace:
                model.next_logits(part, cache)
            blocks = [cache.block(str(i)) for i in range(2)]
            memory.add(tuple(x.data_ptr() for b in blocks for x in (b.keys, b.values) if x is not None))
            counts.append([(call.op, call.axis, call.bytes) for call in trace.calls])
    shapes = {tuple(x.shape) for b in blocks for x in (b.keys, b.values) if x is not None}
    return shapes, len(memory), counts


@pytest.mark.parametrize("layout", [Layout(2), Layout(4), Layout(2, 1, True)], ids=str)
def test_heads_are_split_and_only_one_position_s_logits_are_gathered(layout: Layout, ranks: Ranks) -> None:
    config, rows = llama(num_heads=8, num_kv_heads=4), len(PADDING)
    for shapes, places, counts in ranks(costs, layout.world_size, layout, config):
        assert shapes == {(rows, 4 // layout.tp, LENGTH, 4)}
        assert places == 1
        for columns, calls in zip((PROMPT, 1, 1), counts, strict=True):
            x = "all_reduce", "tp", 4 * rows * columns * 32
            assert calls == [x, x, x, x, x, ("all_gather", "tp", 4 * rows * 128)]


def test_a_process_alone_communicates_nothing() -> None:
    shapes, places, counts = costs(Layout(), gpt())
    assert shapes == {(3, 4, LENGTH, 8)}
    assert (places, counts) == (1, [[], [], []])


@pytest.mark.parametrize(("columns", "text"), [((4, 2), "one at a time"), ((4, 1, 1), r"within length \(5\)")])
def test_columns_that_do_not_fit_are_refused(columns: tuple[int, ...], text: str) -> None:
    cache = KVCache(5)
    with pytest.raises(ValueError, match=text):
        for n in columns:
            cache.advance(n)


# controls: each way to be silently wrong, on purpose


def positions_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Every new token stands where the prompts began."""
    _with_positions(patch, lambda cache: slice(0, cache.stop - cache.start))


def positions_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """New tokens, not the prompts, stand one too far."""
    one = lambda cache: int(cache.start > 0)  # noqa: E731
    _with_positions(patch, lambda cache: slice(cache.start + one(cache), cache.stop + one(cache)))


def positions_counting_padding(patch: pytest.MonkeyPatch) -> None:
    """They count from the first column, not from a prompt's own first token."""
    _with_positions(patch, lambda cache: slice(cache.start, cache.stop))


def _with_positions(patch: pytest.MonkeyPatch, positions: Callable[[KVCache], slice]) -> None:
    advance = KVCache.advance

    def wrong(self: KVCache, columns: int) -> None:
        advance(self, columns)
        self.positions = positions(self)

    patch.setattr(KVCache, "advance", wrong)


def padding_attended_to(patch: pytest.MonkeyPatch) -> None:
    """As if it were tokens."""
    patch.setattr(KVCache, "seen", lambda self, first: None)


def padding_attended_to_after_the_prompts(patch: pytest.MonkeyPatch) -> None:
    """By the new tokens only."""
    seen = KVCache.seen
    patch.setattr(KVCache, "seen", lambda self, first: seen(self, first) if self.start == 0 else None)


def window_ignored(patch: pytest.MonkeyPatch) -> None:
    """New tokens see all."""
    extend = BlockCache.extend
    patch.setattr(BlockCache, "extend", lambda self, k, v, window: extend(self, k, v, None))


def window_one_too_wide(patch: pytest.MonkeyPatch) -> None:
    """New tokens see one more."""
    extend = BlockCache.extend
    patch.setattr(BlockCache, "extend", lambda self, k, v, window: extend(self, k, v, window + 1))


def tokens_forgotten(patch: pytest.MonkeyPatch) -> None:
    """What a step has added is gone in the next."""
    extend = BlockCache.extend

    def forget(self: BlockCache, *args: Any) -> Any:
        k, v, seen = extend(self, *args)
        if self._shared.start:
            k = k.clone()
            assert self.keys is not None
            self.keys[:, :, self._shared.start :] = 0
        return k, v, seen

    patch.setattr(BlockCache, "extend", forget)


def keys_of_another_block(patch: pytest.MonkeyPatch) -> None:
    """One cache for all."""
    block = KVCache.block
    patch.setattr(KVCache, "block", lambda self, name: block(self, "0"))


CONTROLS = [
    (positions_forgotten, "gpt-tied"),
    (positions_forgotten, "llama-heads-untied"),
    (positions_off_by_one, "gpt-tied"),
    (positions_off_by_one, "llama-heads-untied"),
    (positions_counting_padding, "gpt-tied"),
    (padding_attended_to, "gpt-tied"),
    (padding_attended_to, "llama-heads-untied"),
    (padding_attended_to_after_the_prompts, "qwen2-kv1-bias"),
    (window_ignored, "mistral-kv2-window"),
    (window_one_too_wide, "mistral-kv2-window"),
    (tokens_forgotten, "llama-heads-untied"),
    (keys_of_another_block, "gpt-tied"),
]


@pytest.mark.parametrize(("control", "name"), CONTROLS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_cache_that_is_broken_is_seen(control: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = build_random(VARIANTS[name], Mesh(), FP64), reference(name, FP64)
    assert error(cached(model, length=LENGTH + 1), expected) <= TOLERANCE[FP64]
    control(monkeypatch)
    assert error(cached(model, length=LENGTH + 1), expected) > 1e-3


def test_rope_counts_from_each_prompt_s_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only differences of positions matter to it: from the first column the logits would be the same to rounding.

    To that of the tables, which are fp32: that is what is seen here.
    """
    model, expected = build_random(VARIANTS["llama-heads-untied"], Mesh(), FP64), reference("llama-heads-untied", FP64)
    positions_counting_padding(monkeypatch)
    assert TOLERANCE[FP64] < error(cached(model), expected) < 1e-5
