"""transformers' Llama cut by its own tensor-parallel plan: colwise and rowwise layers, and the logits gathered."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from benchmarks.peers.dtensor import whole_gradients
from benchmarks.peers.huggingface import from_plain, llama_config, to_plain
from benchmarks.peers.plain import PlainLlamaConfig, from_tpformer
from benchmarks.peers.step import Step, check_world, dtype_of, gemm_backend, installed

__all__ = ["AXIS", "NAME", "build", "gemm_backend", "version"]

NAME = "transformers tp_plan"
AXIS: Literal["tp", "dp"] = "tp"


def version() -> str:
    """transformers'."""
    return installed("transformers")


def build(shape: PlainLlamaConfig, degree: int, device: torch.device, weights: dict[str, Tensor]) -> Step:
    """The step of LlamaForCausalLM with its own loss, loaded as its users load it, cut over `degree` ranks."""
    version()
    check_world(NAME, degree)
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    model = LlamaForCausalLM.from_pretrained(
        None,
        config=llama_config(shape),
        state_dict=from_plain(from_tpformer(shape, weights)),
        dtype=dtype_of(weights),
        distributed_config=DistributedConfig(tp_size=degree) if degree > 1 else None,
    )
    model.to(device).train()

    def forward_backward(tokens: Tensor, targets: Tensor) -> Tensor:
        # Labels must be given for a loss to be made; with shift_labels theirs does not shift them again.
        loss: Tensor = model(tokens, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return Step(model, forward_backward, lambda: to_plain(whole_gradients(model)))
