"""Models that people name, by the shapes that their papers and config.json files give."""

from typing import Any

from tpformer.models.gpt import GPTConfig
from tpformer.models.llama import LlamaConfig
from tpformer.planner.candidate import ModelConfig


def known_model(name: str) -> ModelConfig:
    """The config of a model by its name. Raises ValueError naming those that are known."""
    models = known_models()
    if name not in models:
        raise ValueError(f"model {name!r} is not known; take one of {', '.join(models)}, or a Hugging Face directory")
    return models[name]


def known_models() -> dict[str, ModelConfig]:
    """Every known model by name; learned from arXiv 2005.14165, 2307.09288, 2407.21783, 2310.06825, 2505.09388."""
    return {
        "gpt2": GPTConfig(50257, 768, 12, 12),
        "gpt2-medium": GPTConfig(50257, 1024, 24, 16),
        "gpt2-large": GPTConfig(50257, 1280, 36, 20),
        "gpt2-xl": GPTConfig(50257, 1600, 48, 25),
        "gpt3-175b": GPTConfig(50257, 12288, 96, 96, max_seq_len=2048),
        "llama2-7b": _llama(4096, 32, 32, 32, 11008, 32000, 4096),
        "llama2-13b": _llama(5120, 40, 40, 40, 13824, 32000, 4096),
        "llama2-70b": _llama(8192, 80, 64, 8, 28672, 32000, 4096),
        "llama-1b": _llama(2048, 16, 32, 8, 8192, 128256, 131072, tie_embeddings=True),
        "llama-8b": _llama(4096, 32, 32, 8, 14336, 128256, 131072),
        "llama-70b": _llama(8192, 80, 64, 8, 28672, 128256, 131072),
        "llama-405b": _llama(16384, 126, 128, 8, 53248, 128256, 131072),
        "mistral-7b": _llama(4096, 32, 32, 8, 14336, 32000, 32768, sliding_window=4096),
        "qwen3-8b": _llama(4096, 36, 32, 8, 12288, 151936, 40960, qk_norm=True, head_dim=128),
        "qwen3-32b": _llama(5120, 64, 64, 8, 25600, 151936, 40960, qk_norm=True, head_dim=128),
    }


def _llama(d: int, layers: int, heads: int, kv: int, ffn: int, vocab: int, length: int, **more: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {"num_layers": layers, "num_heads": heads, "num_kv_heads": kv, "ffn_hidden_size": ffn}
    return LlamaConfig(vocab_size=vocab, hidden_size=d, max_seq_len=length, **sizes, **more)
