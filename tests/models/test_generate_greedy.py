"""Greedy generation gives transformers' greedy tokens, for the same weights: every family, at tp 1, 2 and 4.

fp64 on both sides where the frequencies are exact in it, so that no near tie is decided by rounding.
"""

from functools import lru_cache
from typing import Any

import pytest
import torch

from tests.distributed import Ranks
from tests.models import test_transformers_gpt2 as gpt2
from tests.models import test_transformers_llama as llamas
from tests.models.greedy import NEW, Tokens, ours, prompts, run
from tests.models.oracle import Arrays, arrays, gpt_state, in_double, llama_state
from tests.proofs.cases import Config, Layout

CASES = {
    "gpt2": "tied-gelu-tanh",
    "llama": "llama-kv2-tied",
    "llama linear": "llama-kv1-linear",
    "llama llama3": "llama-kv2-llama3",
    "mistral": "mistral",  # a window of 3, and every prompt but one is longer
    "qwen2": "qwen2-kv2-tied",
    "qwen3": "qwen3-kv2-tied",
}


@lru_cache
def reference(case: str) -> tuple[Config, dict[str, Tokens], Arrays, list[int]]:
    """Our config, transformers' tokens, its weights, and the stop tokens: two which it does generate."""
    name = CASES[case]
    if case == "gpt2":
        config: Config = gpt2.CASES[name][0]
        theirs = gpt2.oracle(name).double().eval()
        weights = arrays(gpt_state(dict(theirs.named_parameters()), config))  # type: ignore[arg-type]
    else:
        config = llamas.CASES[name][0]
        theirs = in_double(llamas.oracle(name, "sdpa")).eval()
        weights = arrays(llama_state(dict(theirs.named_parameters()), config))

    def generate(tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        options = {"pad_token_id": 0} | options
        found: torch.Tensor = theirs.generate(tokens, do_sample=False, max_new_tokens=NEW, **options)
        return found

    tokens, mask = prompts()
    first = generate(tokens, attention_mask=mask, repetition_penalty=1.8)
    ends = [int(first[0, -4]), int(first[1, -2])]
    return config, run(generate, ends, stop="eos_token_id", pad="pad_token_id"), weights, ends


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_greedy_is_transformers_greedy(case: str, tp: int, ranks: Ranks) -> None:
    config, expected, weights, ends = reference(case)
    assert len({str(tokens) for tokens in expected.values()}) == 3
    assert any(77 in row[-NEW:] for row in expected["stop"])
    results = ranks(ours, tp, config, weights, ends, Layout(tp)) if tp > 1 else [ours(config, weights, ends)]
    for found in results:
        assert found == expected
