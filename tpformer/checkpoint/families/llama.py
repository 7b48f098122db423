"""Llama 1 to 3, and the table of names of all models of its shape: Mistral and Qwen differ by a field or two."""

from functools import partial
from typing import Any

import numpy as np
from einops import rearrange

from tpformer.checkpoint.boxes import Kept, Rows
from tpformer.checkpoint.fields import Fields, read_rope, write_rope
from tpformer.models.llama import LlamaConfig

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"
PREFIX = "model."
IGNORED = (r"\.rotary_emb\.inv_freq$",)

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_ACTIVATIONS |= {"gelu_new": "gelu_tanh"}


def read(fields: Fields) -> dict[str, Any]:
    """The LlamaConfig's fields."""
    bias = fields.take("attention_bias", False, bool)
    fields.expect("mlp_bias", False)
    return read_decoder(fields) | {"qkv_bias": bias, "out_bias": bias}


def write(config: LlamaConfig) -> dict[str, Any]:
    """config.json's fields. Raises ValueError for what this family has not."""
    expect(config, sliding_window=None, qk_norm=False, out_bias=config.qkv_bias)
    return write_decoder(config) | {"attention_bias": config.qkv_bias, "mlp_bias": False}


def read_decoder(
    fields: Fields, length: int = 2048, kv_heads: int | None = None, head_dim: int | None = None
) -> dict[str, Any]:
    """What every family of this shape says in the same fields; the numbers are what a missing one means in each."""
    length = fields.take("max_position_embeddings", length)
    theta, scaling = read_rope(fields, length)
    for switch in ("rope_interleaved", "use_mrope"):
        fields.expect(switch, False)
    fields.ignore("is_llama_config", "max_sequence_length")  # the second: older files, no version reads it
    return {
        "vocab_size": fields.take("vocab_size"),
        "hidden_size": fields.take("hidden_size"),
        "num_layers": fields.take("num_hidden_layers"),
        "num_heads": fields.take("num_attention_heads"),
        "num_kv_heads": fields.take("num_key_value_heads", kv_heads, null=True),
        "head_dim": fields.take("head_dim", head_dim),
        "ffn_hidden_size": fields.take("intermediate_size"),
        "max_seq_len": length,
        "activation": fields.choose("hidden_act", _ACTIVATIONS, "silu"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_embeddings": fields.take("tie_word_embeddings", False, bool),
        "norm_eps": fields.take("rms_norm_eps", 1e-6, float),
        "attention_dropout": fields.take("attention_dropout", 0.0, float),
        "init_std": fields.take("initializer_range", 0.02, float),
    }


def write_decoder(config: LlamaConfig) -> dict[str, Any]:
    """The same fields again."""
    c = config
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.attention.head_dim,
        "intermediate_size": c.ffn_hidden_size,
        "max_position_embeddings": c.max_seq_len,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(c.activation, c.activation),
        **write_rope(c.rope_theta, c.rope_scaling),
        "tie_word_embeddings": c.tie_embeddings,
        "rms_norm_eps": c.norm_eps,
        "attention_dropout": c.attention_dropout,
        "initializer_range": c.init_std,
    }


def read_window(fields: Fields, layers: int) -> int | None:
    """Qwen's sliding window, which is all layers' or none's here."""
    window = fields.take("sliding_window", 4096, null=True)
    switched_on = fields.take("use_sliding_window", False, bool)
    first, types = fields.take("max_window_layers", 28), fields.take("layer_types", None, list)
    window = window if switched_on else None
    if types is None:
        types = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(layers)]
    if len(set(types)) > 1:
        fields.problems.append("layer_types or max_window_layers: windows in some layers only are not supported")
    return window if set(types) == {"sliding_attention"} else None


def write_window(config: LlamaConfig) -> dict[str, Any]:
    """The fields that `read_window` reads."""
    if config.sliding_window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    return {"use_sliding_window": True, "sliding_window": config.sliding_window, "max_window_layers": 0}


def expect(config: Any, **values: Any) -> None:
    """Raises ValueError naming each field of the config that is not as a family needs it."""
    wrong = [
        f"{name} ({getattr(config, name)!r}) must be {value!r}"
        for name, value in values.items()
        if getattr(config, name) != value
    ]
    if wrong:
        raise ValueError(f"no Hugging Face family has such a model; of the nearest, {', '.join(wrong)}")


def names(config: LlamaConfig) -> list[Kept]:
    """How every parameter of the whole model is kept."""
    found = [Kept("embedding.weight", ("model.embed_tokens.weight",)), Kept("norm.weight", ("model.norm.weight",))]
    if not config.tie_embeddings:
        found.append(Kept("head.weight", ("lm_head.weight",)))
    for layer in range(config.num_layers):
        found += _block(config, f"blocks.{layer}.", f"model.layers.{layer}.")
    return found


def _block(config: LlamaConfig, ours: str, theirs: str) -> list[Kept]:
    qkv = partial(split_qkv, kv=config.kv_heads, k=config.attention.head_dim)
    attention = theirs + "self_attn."
    found = [
        Kept(ours + "attention_norm.weight", (theirs + "input_layernorm.weight",)),
        Kept(ours + "attention.qkv.weight", tuple(f"{attention}{x}_proj.weight" for x in "qkv"), qkv),
        Kept(ours + "attention.out.weight", (attention + "o_proj.weight",)),
        Kept(ours + "mlp_norm.weight", (theirs + "post_attention_layernorm.weight",)),
        Kept(ours + "mlp.gate_up.weight", tuple(f"{theirs}mlp.{x}_proj.weight" for x in ("gate", "up")), split_gate_up),
        Kept(ours + "mlp.down.weight", (theirs + "mlp.down_proj.weight",)),
    ]
    if config.qkv_bias:
        found.append(Kept(ours + "attention.qkv.bias", tuple(f"{attention}{x}_proj.bias" for x in "qkv"), qkv))
    if config.out_bias:
        found.append(Kept(ours + "attention.out.bias", (attention + "o_proj.bias",)))
    if config.qk_norm:
        found += [Kept(f"{ours}attention.{x}_norm.weight", (f"{attention}{x}_norm.weight",)) for x in "qk"]
    return found


def split_qkv(rows: Rows, kv: int, k: int) -> tuple[Rows, ...]:
    """Our q|k|v, grouped per KV head, as their three."""
    groups = rearrange(rows, "(kv heads k) -> kv heads k", kv=kv, k=k)
    q, key, value = np.split(groups, [groups.shape[1] - 2, groups.shape[1] - 1], axis=1)
    return tuple(rearrange(x, "kv heads k -> (kv heads k)") for x in (q, key, value))


def split_gate_up(rows: Rows) -> tuple[Rows, ...]:
    """Our gate|up, row by row, as their two."""
    return tuple(rearrange(rows, "(f two) -> two f", two=2))
