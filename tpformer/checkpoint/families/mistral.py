"""Mistral: a Llama whose tokens see a window of positions (arXiv 2310.06825)."""

from typing import Any

from tpformer.checkpoint.families import llama
from tpformer.checkpoint.fields import Fields
from tpformer.models.llama import LlamaConfig

MODEL_TYPE = "mistral"
ARCHITECTURE = "MistralForCausalLM"
PREFIX, IGNORED, names = llama.PREFIX, llama.IGNORED, llama.names


def read(fields: Fields) -> dict[str, Any]:
    """The LlamaConfig's fields."""
    found = llama.read_decoder(fields, length=131072, kv_heads=8)
    return found | {"sliding_window": fields.take("sliding_window", 4096, null=True)}


def write(config: LlamaConfig) -> dict[str, Any]:
    """config.json's fields. Raises ValueError for what this family has not."""
    llama.expect(config, qkv_bias=False, out_bias=False, qk_norm=False)
    return llama.write_decoder(config) | {"sliding_window": config.sliding_window}
