"""Our GPT is transformers' GPT-2: same weights, same logits, loss and every gradient, in fp32 and fp64."""

from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import transformers

from tests.distributed import Ranks
from tests.models.oracle import Arrays, arrays, gpt_state, measure_oracle, measure_ours, randomise
from tests.proofs.cases import TOLERANCE, Layout, Measured, gpt, mismatches
from tpformer import GPTConfig

CASES: dict[str, tuple[GPTConfig, dict[str, Any]]] = {
    "tied-gelu-tanh": (gpt(), {}),
    "untied-gelu-257": (gpt(tie_embeddings=False, activation="gelu", vocab_size=257), {"activation_function": "gelu"}),
    "tied-relu-narrow": (
        gpt(activation="relu", ffn_hidden_size=40, norm_eps=1e-2),
        {"activation_function": "relu", "n_inner": 40},
    ),
}


def oracle(case: str) -> Any:
    """Transformers' GPT-2 for a case, with random weights and without dropout."""
    ours, options = CASES[case]
    sizes = {
        "vocab_size": ours.vocab_size,
        "n_embd": ours.hidden_size,
        "n_layer": ours.num_layers,
        "n_head": ours.num_heads,
        "n_positions": ours.max_seq_len,
        "layer_norm_epsilon": ours.norm_eps,
        "tie_word_embeddings": ours.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**(sizes | dropout | options), attn_implementation="sdpa")
    model = transformers.GPT2LMHeadModel(config)
    randomise(model)
    return model


@lru_cache
def reference(case: str, dtype: torch.dtype) -> tuple[Measured, Arrays]:
    """What transformers computes, and the weights it does so with."""
    config, model = CASES[case][0], oracle(case).to(dtype)
    weights = arrays(gpt_state(dict(model.named_parameters()), config))
    return measure_oracle(model, partial(gpt_state, config=config), config.vocab_size), weights


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_transformers(case: str, tp: int, dtype: torch.dtype, ranks: Ranks) -> None:
    expected, weights = reference(case, dtype)
    for found in ranks(measure_ours, tp, CASES[case][0], weights, Layout(tp)):
        assert mismatches(expected, found, TOLERANCE[dtype]) == []


def test_the_activation_matters() -> None:
    expected, weights = reference("tied-gelu-tanh", torch.float64)
    wrong = mismatches(expected, measure_ours(gpt(activation="gelu"), weights), 1e-6)
    assert any(line.startswith("logits") for line in wrong)
