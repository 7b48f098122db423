"""Negative controls of attention's tests: each way to be silently wrong, made on purpose, is noticed by the proof."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.kernels.attention_cases import CAUSAL, PLACE, PLAIN, Shape, prove
from tests.kernels.support import DEVICE, replaced
from tpformer_kernels import AttentionOptions, attention_kernels, attention_ops

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels cannot be patched")

WINDOW = AttentionOptions(causal=True, window=18)
DROPOUT = AttentionOptions(dropout=0.3, place=PLACE)
MASK = torch.arange(35).expand(2, 35) < 30
ENDS = [20, 35]
seen_pairs, band, kept_pairs = (getattr(attention_kernels, n) for n in ("seen_pairs", "band", "kept_pairs"))
delta, tiles = attention_ops._delta, attention_ops._tiles


def window_off_by_one(position: Any, column: Any, keys: Any, window: Any, *flags: Any) -> Any:
    return seen_pairs(position, column, keys, window + 1, *flags)


def aligned_at_the_start(position: Any, column: Any, keys: Any, *others: Any) -> Any:
    return seen_pairs(position - 3, column, keys, *others)


def last_block_forgotten(first: Any, last: Any, length: Any, back: Any, ahead: Any, *flags: Any) -> Any:
    low, full, part, high = band(first, last, length, back, ahead, *flags)
    return low, full, part, high - 16


def never_masked(first: Any, last: Any, length: Any, back: Any, ahead: Any, *flags: Any) -> Any:
    low, _, _, high = band(first, last, length, back, ahead, *flags)
    return low, 0, high + 16, high


def without_the_head(low: Any, high: Any, threshold: Any, sample: Any, head: Any, *others: Any) -> Any:
    return kept_pairs(low, high, threshold, sample, head * 0 + 3, *others)


def without_the_sample(low: Any, high: Any, threshold: Any, sample: Any, *others: Any) -> Any:
    return kept_pairs(low, high, threshold, sample * 0 + 7, *others)


def no_delta(do: Any, o: Any, lse: Any, dlse: Any) -> Any:
    return torch.zeros_like(lse)


def no_gradient_of_lse(do: Any, o: Any, lse: Any, dlse: Any) -> Any:
    return delta(do, o, lse, None)


def all_keys(key_mask: Any) -> Any:
    return None if key_mask is None else torch.ones_like(key_mask).view(torch.uint8)


def one_sequence(x: Any, block: int, cu_seqlens: Any) -> Any:
    return tiles(x, block, None)


CONTROLS: dict[str, tuple[str, Callable[..., Any], Shape, AttentionOptions, dict[str, Any]]] = {
    "window": ("seen_pairs", window_off_by_one, Shape(1), WINDOW, {}),
    "alignment": ("seen_pairs", aligned_at_the_start, Shape(1, 1, 1, 19, 22), CAUSAL, {}),
    "last block": ("band", last_block_forgotten, Shape(1), CAUSAL, {}),
    "no mask": ("band", never_masked, Shape(1), CAUSAL, {}),
    "head": ("kept_pairs", without_the_head, Shape(1), DROPOUT, {}),
    "sample": ("kept_pairs", without_the_sample, Shape(2), DROPOUT, {}),
    "sample of a packed sequence": (
        "kept_pairs",
        without_the_sample,
        Shape(1),
        DROPOUT,
        {"ends": ENDS},
    ),
    "delta": ("_delta", no_delta, Shape(1), CAUSAL, {}),
    "gradient of lse": ("_delta", no_gradient_of_lse, Shape(1), CAUSAL, {}),
    "key mask": (
        "_as_bytes",
        all_keys,
        Shape(2),
        PLAIN,
        {"key_mask": MASK},
    ),
    "packing": ("_tiles", one_sequence, Shape(1), CAUSAL, {"ends": ENDS}),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_it_is_noticed(name: str) -> None:
    attribute, wrong, shape, options, masks = CONTROLS[name]
    prove(shape, options, **masks)
    with replaced(attribute, wrong), pytest.raises(AssertionError, match=r"outputs|gradients"):
        prove(shape, options, **masks)


@pytest.mark.parametrize("name", ["WINDOW", "CAUSAL", "SOFTCAP", "DROPOUT"])
def test_an_option_that_is_dropped_is_noticed(name: str) -> None:
    """In forward alone, or in backward alone."""
    everything = AttentionOptions(causal=True, window=18, softcap=1.5, dropout=0.3, place=PLACE)
    launch = attention_ops.launch
    for kernels in ("forward", "dkdv", "dq"):

        def without(kernel: Any, *arguments: Any, kernels: str = kernels, **options: Any) -> None:
            changed = {name: False} if name in options and kernels in kernel.__name__ else {}
            launch(kernel, *arguments, **(options | changed))

        with patch.object(attention_ops, "launch", without), pytest.raises(AssertionError, match=r"outputs|gradients"):
            prove(Shape(1), everything)
