"""config.json both ways: what transformers would compute otherwise is refused, and what we write it understands."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.models.test_transformers_llama import CASES
from tests.proofs.cases import VARIANTS, Config, gpt, llama
from tpformer import LlamaConfig, RopeScaling
from tpformer.checkpoint.huggingface import config_json, read_config
from tpformer.layers.rope import rope_frequencies

CONFIGS: dict[str, Config] = {name: config for name, config in VARIANTS.items() if "out-bias" not in name}
CONFIGS |= {f"case {name}": config for name, (config, _, _) in CASES.items()}
CONFIGS["qwen2-window"] = llama(qkv_bias=True, sliding_window=3)
CONFIGS["qwen3-biases-window"] = llama(qk_norm=True, qkv_bias=True, out_bias=True, sliding_window=5)
CONFIGS["gpt-dropout"] = gpt(dropout=0.25, attention_dropout=0.5, init_std=0.03)


def written(config: Config, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    (directory / "config.json").write_text(json.dumps(config_json(config, dtype)))
    return directory


def plain(config: Config) -> Config:
    """With the defaults of two fields said aloud, as config.json does."""
    if isinstance(config, LlamaConfig):
        return replace(config, num_kv_heads=config.kv_heads, head_dim=config.attention.head_dim, dropout=0.0)
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_survives_config_json_and_transformers(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    assert read_config(written(config, tmp_path))[1] == plain(config)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.dtype == torch.float32
    assert theirs.eos_token_id is None
    theirs.save_pretrained(tmp_path / "again")  # with fields and defaults of theirs
    assert read_config(tmp_path / "again")[1] == plain(config)


def table(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {"model_type": kind, **sizes, "intermediate_size": 40, "hidden_act": "silu", **changes}


def gpt2(**changes: Any) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "embd_pdrop": 0.0, "resid_pdrop": 0.0, **changes}


REFUSED = [
    (table(kind="mixtral"), "model_type 'mixtral' is not supported, only gpt2, llama"),
    (table(hidden_act="relu"), "hidden_act ('relu') is not supported, only 'silu'"),
    (table(mlp_bias=True), "mlp_bias (True) is not supported, only False"),
    (table(vocab_size="many"), "vocab_size ('many') must be of type int"),
    (table(vocab_size=True), "vocab_size (True) must be of type int"),
    (table(quantization_config={"bits": 4}), "quantization_config ({'bits': 4}) is not known"),
    (table(partial_rotary_factor=0.5), "partial_rotary_factor (0.5) is not supported"),
    (table(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope type ('dynamic') is not supported"),
    (table(rope_parameters={"rope_type": "longrope", "factor": 2.0}), "rope_type ('longrope') is not supported"),
    (table(rope_parameters={"rope_type": "llama3", "factor": 2.0}), "low_freq_factor is missing"),
    (
        table(rope_parameters={"rope_type": "yarn", "factor": 2.0, "truncate": False}),
        "truncate (False) is not supported, only True",
    ),
    (table(rope_parameters={"rope_type": "linear", "factor": 2.0, "surprise": 1}), "rope: surprise (1) is not known"),
    (table(hidden_size=33), "hidden_size (33) must be divisible by num_heads (4)"),
    (table("qwen2", use_sliding_window=True, max_window_layers=1), "windows in some layers only"),
    (table("qwen3", layer_types=["full_attention", "sliding_attention"]), "windows in some layers only"),
    (gpt2(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx (True) is not supported"),
    (gpt2(activation_function="silu"), "activation_function ('silu') is not supported"),
    (gpt2(resid_pdrop=0.1), "embd_pdrop (0.0) and resid_pdrop (0.1) must be equal"),
    ({"hidden_size": 32}, "without a model_type"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_would_change_the_numbers_is_named(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        read_config(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_missing_field_is_what_transformers_makes_of_it(kind: str, tmp_path: Path) -> None:
    """The length too, which is where a scaling without one of its own begins: it would change every rotation."""
    rope = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    fields = table(kind, hidden_size=128, num_attention_heads=32, rope_scaling=rope)
    del fields["hidden_act"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours, theirs = read_config(tmp_path)[1], transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(ours, LlamaConfig)
    assert ours.max_seq_len == theirs.max_position_embeddings
    assert ours.rope_scaling.original_max_seq_len == theirs.rope_parameters["original_max_position_embeddings"]
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.attention.head_dim == getattr(theirs, "head_dim", 128 // 32)
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert (ours.rope_theta, ours.norm_eps) == (theirs.rope_parameters["rope_theta"], theirs.rms_norm_eps)
    assert (ours.tie_embeddings, ours.activation) == (theirs.tie_word_embeddings, theirs.hidden_act)


@pytest.mark.parametrize(
    "fields",
    [
        gpt2(n_ctx=1024, n_special=0, predict_special_tokens=True, output_past=True, summary_activation=None),
        table(max_sequence_length=2048, pad_token_id=0, torch_dtype="float16", rope_scaling=None),
    ],
    ids=["gpt2-medium", "llama-7b"],
)
def test_what_the_first_files_of_a_family_have_beside(fields: dict[str, Any], tmp_path: Path) -> None:
    """Fields that no version of transformers computes with."""
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = read_config(tmp_path)[1]
    assert config.max_seq_len == transformers.AutoConfig.from_pretrained(tmp_path).max_position_embeddings


def test_null_is_a_value_only_where_transformers_takes_it(tmp_path: Path) -> None:
    fields = table("mistral", num_key_value_heads=None, head_dim=None, sliding_window=None)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = read_config(tmp_path)[1]
    assert isinstance(config, LlamaConfig)
    assert (config.kv_heads, config.attention.head_dim, config.sliding_window) == (4, 8, None)
    wrong = ("vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    fields |= dict.fromkeys(wrong) | {"rope_scaling": {"rope_type": "yarn", "factor": None}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"factor \(None\) must be of type float") as caught:
        read_config(tmp_path)
    assert all(f"{name} (None) must be of type" in str(caught.value) for name in wrong)


def test_everything_wrong_is_in_one_error(tmp_path: Path) -> None:
    fields = table(hidden_act="relu", mlp_bias=True, surprise=[1])
    del fields["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"vocab_size is missing") as caught:
        read_config(tmp_path)
    assert all(name in str(caught.value) for name in ("hidden_act", "mlp_bias", "surprise"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_damaged_config_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="damaged or without a model_type"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["", "meta-llama/Llama-3.2-1B", "file"])
def test_no_config_json(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ValueError, match=r"config\.json is missing: .*nothing is downloaded.*step_"):
        read_config(tmp_path / name)


def test_yarns_attention_factor_from_mscale(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    rope |= {"mscale": 0.7, "mscale_all_dim": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(table(rope_parameters=rope)))
    ours = read_config(tmp_path)[1]
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    _, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](theirs)
    assert isinstance(ours, LlamaConfig)
    assert ours.rope_scaling.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("original", [4, 8, 12, 13, 64, 4096])
@pytest.mark.parametrize("beta_slow", [1.0, 2.0])
def test_yarns_ramp_is_transformers_however_short_the_context(original: int, beta_slow: float, tmp_path: Path) -> None:
    """Below 2 pi beta_slow tokens the ramp ends before it begins."""
    rope = {"rope_type": "yarn", "factor": 2.0, "beta_slow": beta_slow, "original_max_position_embeddings": original}
    (tmp_path / "config.json").write_text(json.dumps(table(head_dim=128, rope_parameters=rope)))
    config = read_config(tmp_path)[1]
    assert isinstance(config, LlamaConfig)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    frequencies, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    found, _ = rope_frequencies(128, config.rope_theta, config.rope_scaling)
    assert torch.allclose(found, frequencies, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (llama(out_bias=True), "out_bias (True) must be False"),
        (llama(qk_norm=True, qkv_bias=True), "out_bias (False) must be True"),
        (llama(sliding_window=3, out_bias=True), "out_bias (True) must be False"),
        (llama(qkv_bias=True, out_bias=True, sliding_window=3), "qkv_bias (True) must be False"),
    ],
    ids=str,
)
def test_what_no_family_has(config: LlamaConfig, message: str) -> None:
    with pytest.raises(ValueError, match="no Hugging Face family") as caught:
        config_json(config, torch.float32)
    assert message in str(caught.value)


def test_each_scaling_is_written_as_transformers_checks_it(tmp_path: Path) -> None:
    for scaling in (RopeScaling("linear", 2.0), RopeScaling("yarn", 4.0, 64, beta_fast=16.0, attention_factor=0.5)):
        config = llama(rope_scaling=scaling, max_seq_len=256, rope_theta=500.0)
        theirs = transformers.AutoConfig.from_pretrained(written(config, tmp_path))
        assert theirs.rope_parameters["rope_type"] == scaling.kind
        assert theirs.rope_parameters["rope_theta"] == 500.0
