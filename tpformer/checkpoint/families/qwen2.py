"""Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values (arXiv 2407.10671)."""

from typing import Any

from tpformer.checkpoint.families import llama
from tpformer.checkpoint.fields import Fields
from tpformer.models.llama import LlamaConfig

MODEL_TYPE = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"
PREFIX, IGNORED, names = llama.PREFIX, llama.IGNORED, llama.names


def read(fields: Fields) -> dict[str, Any]:
    """The LlamaConfig's fields."""
    found = llama.read_decoder(fields, length=32768, kv_heads=32)
    return found | {"sliding_window": llama.read_window(fields, found["num_layers"]), "qkv_bias": True}


def write(config: LlamaConfig) -> dict[str, Any]:
    """config.json's fields. Raises ValueError for what this family has not."""
    llama.expect(config, qkv_bias=True, out_bias=False, qk_norm=False)
    return llama.write_decoder(config) | llama.write_window(config)
