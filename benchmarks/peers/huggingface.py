"""transformers' Llama, as it comes and with the kernels of Liger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.plain import PlainLlamaConfig, from_tpformer
from benchmarks.peers.shards import renamed

MODULES = {  # the plain model's names, which tpformer shares, and theirs
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
}


def from_plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain model's weights under the names of LlamaForCausalLM."""
    return {renamed(name, MODULES, "model.layers"): tensor for name, tensor in state.items()}


def llama_config(config: PlainLlamaConfig) -> Any:
    """transformers' configuration of the plain model, with torch's attention; needs the package transformers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        intermediate_size=config.ffn_hidden_size,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )


class HuggingFaceLlama(nn.Module):
    """LlamaForCausalLM with torch's attention and its own loss; needs the package transformers.

    `patched` is entered around construction and around every forward.
    """

    def __init__(
        self,
        config: PlainLlamaConfig,
        dtype: torch.dtype = torch.float32,
        patched: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__()
        from transformers import LlamaForCausalLM

        self.config, self.patched = config, patched
        with patched():
            self.causal = LlamaForCausalLM(llama_config(config))
        for parameter in self.causal.parameters():  # their rotary frequencies stay fp32, as when they load a model
            parameter.data = parameter.data.to(dtype)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per token; both arguments are (b, s)."""
        with self.patched():
            # Labels must be given for a loss to be made; with shift_labels theirs does not shift them again.
            loss: Tensor = self.causal(tokens, labels=targets, shift_labels=targets, use_cache=False).loss
            return loss

    def load_from_tpformer(self, full: dict[str, Tensor]) -> None:
        """Copy tpformer's whole tensors, under its names; raises RuntimeError if names differ."""
        self.causal.load_state_dict(from_plain(from_tpformer(self.config, full)))


def liger_kernels() -> Callable[[], AbstractContextManager[None]]:
    """A context in which transformers' Llama has all of Liger's kernels; raises ImportError if it is not installed.

    Liger replaces names of a whole module, once for all models: outside the context they are as before.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    causal = modeling_llama.LlamaForCausalLM
    names, forward = dict(vars(modeling_llama)), causal.forward
    apply_liger_kernel_to_llama()  # once: it takes a second, which no step may pay
    replaced = {name: value for name, value in vars(modeling_llama).items() if names.get(name) is not value}
    liger_forward, causal.forward = causal.forward, forward
    vars(modeling_llama).update(names)

    @contextmanager
    def inside() -> Iterator[None]:
        vars(modeling_llama).update(replaced)
        causal.forward = liger_forward
        try:
            yield
        finally:
            vars(modeling_llama).update(names)
            causal.forward = forward

    return inside
