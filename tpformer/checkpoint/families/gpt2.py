"""GPT-2: weights as (in, out), q|k|v as three blocks of columns, the head tied to the embedding."""

from functools import partial
from typing import Any

import numpy as np

from tpformer.checkpoint.boxes import Kept, Rows
from tpformer.checkpoint.families.llama import split_qkv
from tpformer.checkpoint.fields import Fields
from tpformer.models.gpt import GPTConfig

MODEL_TYPE = "gpt2"
ARCHITECTURE = "GPT2LMHeadModel"
PREFIX = "transformer."
IGNORED = (r"\.attn\.(masked_)?bias$",)  # causal masks, which older files have among the weights

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


def read(fields: Fields) -> dict[str, Any]:
    """The GPTConfig's fields."""
    embedding, residual = fields.take("embd_pdrop", 0.1, float), fields.take("resid_pdrop", 0.1, float)
    if embedding != residual:
        fields.problems.append(f"embd_pdrop ({embedding}) and resid_pdrop ({residual}) must be equal")
    fields.expect("scale_attn_weights", True)
    fields.expect("scale_attn_by_inverse_layer_idx", False)
    fields.expect("add_cross_attention", False)
    fields.ignore("n_ctx", "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout")
    fields.ignore("summary_proj_to_labels", "summary_type", "summary_use_proj")
    fields.ignore("n_special", "predict_special_tokens")  # of the larger models' files
    return {
        "vocab_size": fields.take("vocab_size", 50257),
        "hidden_size": fields.take("n_embd", 768),
        "num_layers": fields.take("n_layer", 12),
        "num_heads": fields.take("n_head", 12),
        "ffn_hidden_size": fields.take("n_inner", None),
        "max_seq_len": fields.take("n_positions", 1024),
        "activation": fields.choose("activation_function", _ACTIVATIONS, "gelu_new"),
        "tie_embeddings": fields.take("tie_word_embeddings", True, bool),
        "norm_eps": fields.take("layer_norm_epsilon", 1e-5, float),
        "dropout": residual,
        "attention_dropout": fields.take("attn_pdrop", 0.1, float),
        "init_std": fields.take("initializer_range", 0.02, float),
    }


def write(config: GPTConfig) -> dict[str, Any]:
    """config.json's fields."""
    c = config
    return {
        "vocab_size": c.vocab_size,
        "n_embd": c.hidden_size,
        "n_layer": c.num_layers,
        "n_head": c.num_heads,
        "n_inner": c.ffn_hidden_size,
        "n_positions": c.max_seq_len,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(c.activation, c.activation),
        "tie_word_embeddings": c.tie_embeddings,
        "layer_norm_epsilon": c.norm_eps,
        "embd_pdrop": c.dropout,
        "resid_pdrop": c.dropout,
        "attn_pdrop": c.attention_dropout,
        "initializer_range": c.init_std,
    }


def names(config: GPTConfig) -> list[Kept]:
    """How every parameter of the whole model is kept."""
    found = [
        Kept("embedding.weight", ("transformer.wte.weight",)),
        Kept("position.weight", ("transformer.wpe.weight",)),
        Kept("norm.weight", ("transformer.ln_f.weight",)),
        Kept("norm.bias", ("transformer.ln_f.bias",)),
    ]
    if not config.tie_embeddings:
        found.append(Kept("head.weight", ("lm_head.weight",)))
    qkv = partial(_one_after_another, heads=config.num_heads, k=config.hidden_size // config.num_heads)
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}.", f"transformer.h.{layer}."
        for kind in ("weight", "bias"):
            turned = kind == "weight"
            found += [
                Kept(f"{ours}attention_norm.{kind}", (f"{theirs}ln_1.{kind}",)),
                Kept(f"{ours}attention.qkv.{kind}", (f"{theirs}attn.c_attn.{kind}",), qkv, turned),
                Kept(f"{ours}attention.out.{kind}", (f"{theirs}attn.c_proj.{kind}",), None, turned),
                Kept(f"{ours}mlp_norm.{kind}", (f"{theirs}ln_2.{kind}",)),
                Kept(f"{ours}mlp.up.{kind}", (f"{theirs}mlp.c_fc.{kind}",), None, turned),
                Kept(f"{ours}mlp.down.{kind}", (f"{theirs}mlp.c_proj.{kind}",), None, turned),
            ]
    return found


def _one_after_another(rows: Rows, heads: int, k: int) -> tuple[Rows]:
    """Our q|k|v, grouped per head, as one tensor of three blocks."""
    return (np.concatenate(split_qkv(rows, heads, k)),)
