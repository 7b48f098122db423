"""Qwen3: a Llama that normalises each query and key head, whose width is a field of its own (arXiv 2505.09388)."""

from typing import Any

from tpformer.checkpoint.families import llama
from tpformer.checkpoint.fields import Fields
from tpformer.models.llama import LlamaConfig

MODEL_TYPE = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"
PREFIX, IGNORED, names = llama.PREFIX, llama.IGNORED, llama.names


def read(fields: Fields) -> dict[str, Any]:
    """The LlamaConfig's fields."""
    found = llama.read_decoder(fields, length=32768, kv_heads=32, head_dim=128)
    bias = fields.take("attention_bias", False, bool)
    window = llama.read_window(fields, found["num_layers"])
    biases = {"qkv_bias": bias, "out_bias": bias}
    return found | biases | {"sliding_window": window, "qk_norm": True}


def write(config: LlamaConfig) -> dict[str, Any]:
    """config.json's fields. Raises ValueError for what this family has not."""
    llama.expect(config, qk_norm=True, out_bias=config.qkv_bias)
    return llama.write_decoder(config) | llama.write_window(config) | {"attention_bias": config.qkv_bias}
