"""Greedy generation gives transformers' greedy tokens, for the same weights."""

import pytest
import torch

from tests.models.oracle import in_double, llama_state
from tests.models.test_transformers_llama import CASES, oracle
from tpformer import Llama, load_full_state


@pytest.mark.parametrize("case", ["llama", "llama-kv2-tied", "mistral", "qwen3-kv2-tied"])
def test_greedy_is_transformers_greedy(case: str) -> None:
    config = CASES[case][0]
    theirs = in_double(oracle(case, "sdpa")).eval()
    ours = Llama(config).double()
    load_full_state(ours, llama_state(dict(theirs.named_parameters()), config))
    prompt = torch.randint(101, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompt)
    expected = theirs.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=10, pad_token_id=0)
    assert expected.shape == (3, 15)
    assert torch.equal(ours.generate(prompt, max_new_tokens=10, temperature=0.0), expected)
