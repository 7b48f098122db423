"""Our Llama is transformers' Llama, Mistral, Qwen2 and Qwen3: same weights, same logits, loss and every gradient.

fp32 against their models as they are (eager attention); fp64 against the same models with torch.nn.RMSNorm in
place of theirs, which rounds to fp32. Both kinds of stretched frequencies that blend (llama3, yarn) are computed
in fp32 by either side, in another order of operations: fp32 only.
"""

from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import transformers

from tests.distributed import Ranks
from tests.models.oracle import Arrays, arrays, in_double, llama_state, measure_oracle, measure_ours, randomise
from tests.proofs.cases import TOLERANCE, Layout, Measured, llama, mismatches
from tpformer import LlamaConfig, RopeScaling

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
THETA = 100.0  # so that the four frequencies of a head lie in all three regions of llama3 and yarn
# our config, their family, and their options that ours do not tell
CASES: dict[str, tuple[LlamaConfig, str, dict[str, Any]]] = {
    "llama": (llama(), "Llama", {}),
    "llama-kv2-tied": (llama(num_kv_heads=2, tie_embeddings=True), "Llama", {}),
    "llama-kv1-linear": (
        llama(num_kv_heads=1, rope_scaling=RopeScaling("linear", 2.5)),
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5}},
    ),
    "llama-kv2-llama3": (
        llama(num_kv_heads=2, rope_theta=THETA, rope_scaling=RopeScaling("llama3", 4.0, 64)),
        "Llama",
        {"rope_parameters": LLAMA3},
    ),
    "llama-yarn-biases": (
        llama(qkv_bias=True, out_bias=True, rope_theta=THETA, rope_scaling=RopeScaling("yarn", 4.0, 64)),
        "Llama",
        {"rope_parameters": YARN, "attention_bias": True},
    ),
    "llama-yarn-factor": (
        llama(rope_theta=THETA, rope_scaling=RopeScaling("yarn", 4.0, 64, attention_factor=0.7)),
        "Llama",
        {"rope_parameters": YARN | {"attention_factor": 0.7}},
    ),
    "llama-gelu-tanh": (llama(activation="gelu_tanh", norm_eps=1e-2), "Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral": (llama(num_kv_heads=2, sliding_window=3), "Mistral", {"sliding_window": 3}),
    "mistral-no-window": (llama(num_kv_heads=2), "Mistral", {"sliding_window": None}),
    "qwen2-kv2-tied": (llama(num_kv_heads=2, qkv_bias=True, tie_embeddings=True), "Qwen2", {}),
    "qwen2-kv1": (llama(num_kv_heads=1, qkv_bias=True), "Qwen2", {}),
    "qwen3-kv2-tied": (llama(num_kv_heads=2, qk_norm=True, head_dim=12, tie_embeddings=True), "Qwen3", {}),
    "qwen3-kv1-257": (llama(num_kv_heads=1, qk_norm=True, head_dim=8, vocab_size=257, norm_eps=1e-2), "Qwen3", {}),
}
EXACT = [name for name in CASES if "yarn" not in name and "llama3" not in name]


def oracle(case: str, attention: str) -> Any:
    """Transformers' model for a case, with random weights."""
    ours, family, options = CASES[case]
    rope = {"rope_type": "default"} | options.get("rope_parameters", {})
    sizes = {
        "vocab_size": ours.vocab_size,
        "hidden_size": ours.hidden_size,
        "intermediate_size": ours.ffn_hidden_size,
        "num_hidden_layers": ours.num_layers,
        "num_attention_heads": ours.num_heads,
        "num_key_value_heads": ours.kv_heads,
        "head_dim": ours.attention.head_dim,
        "tie_word_embeddings": ours.tie_embeddings,
        "rms_norm_eps": ours.norm_eps,
        "max_position_embeddings": 256 if "factor" in rope else ours.max_seq_len,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": attention,
    }
    options = options | {"rope_parameters": rope | {"rope_theta": ours.rope_theta}}
    config = getattr(transformers, f"{family}Config")(**(sizes | options))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    randomise(model)
    return model


@lru_cache
def reference(case: str, dtype: torch.dtype) -> tuple[Measured, Arrays]:
    """What transformers computes, and the weights it does so with."""
    config = CASES[case][0]
    model = oracle(case, "eager") if dtype == torch.float32 else in_double(oracle(case, "sdpa"))
    weights = arrays(llama_state(dict(model.named_parameters()), config))
    return measure_oracle(model, partial(llama_state, config=config), config.vocab_size), weights


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("case", "dtype"), [(case, torch.float32) for case in CASES] + [(case, torch.float64) for case in EXACT], ids=str
)
def test_logits_loss_and_gradients_are_transformers(case: str, dtype: torch.dtype, tp: int, ranks: Ranks) -> None:
    expected, weights = reference(case, dtype)
    results = (
        ranks(measure_ours, tp, CASES[case][0], weights, Layout(tp))
        if tp > 1
        else [measure_ours(CASES[case][0], weights)]
    )
    for found in results:
        assert mismatches(expected, found, TOLERANCE[dtype]) == []


PLAIN = [  # a case, and a model that lacks one of its options
    ("llama-kv1-linear", llama(num_kv_heads=1)),
    ("llama-kv2-llama3", llama(num_kv_heads=2, rope_theta=THETA)),
    ("llama-yarn-factor", llama(rope_theta=THETA)),
    ("llama-yarn-factor", llama(rope_theta=THETA, rope_scaling=RopeScaling("yarn", 4.0, 64))),
    ("llama-gelu-tanh", llama(activation="gelu", norm_eps=1e-2)),
    ("llama-gelu-tanh", llama(activation="gelu_tanh", norm_eps=1e-5)),
    ("mistral", llama(num_kv_heads=2)),
]


@pytest.mark.parametrize(("case", "plain"), PLAIN, ids=lambda x: x if isinstance(x, str) else "")
def test_each_option_changes_the_logits(case: str, plain: LlamaConfig) -> None:
    """An oracle and a model that both ignored an option would agree above, but not differ here."""
    expected, weights = reference(case, torch.float32)
    wrong = mismatches(expected, measure_ours(plain, weights), 1e-4)
    assert any(line.startswith("logits") for line in wrong)
