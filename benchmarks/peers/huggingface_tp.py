"""transformers' Llama cut by its own tensor-parallel plan: colwise and rowwise layers, and the logits gathered."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from benchmarks.peers.dtensor import whole_gradients
from benchmarks.peers.huggingface import MODULES, HuggingFaceLlama
from benchmarks.peers.plain import PlainLlamaConfig, from_tpformer
from benchmarks.peers.shards import renamed
from benchmarks.peers.step import Step, check_world, dtype_of, gemm_backend, installed

__all__ = ["AXIS", "NAME", "build", "gemm_backend", "version"]

NAME = "transformers tp_plan"
AXIS: Literal["tp", "dp"] = "tp"


def version() -> str:
    """transformers'."""
    return installed("transformers")


def build(shape: PlainLlamaConfig, degree: int, device: torch.device, weights: dict[str, Tensor]) -> Step:
    """The step of LlamaForCausalLM with its own loss, cut over `degree` ranks as from_pretrained cuts it."""
    version()
    check_world(NAME, degree)
    from transformers.distributed import DistributedConfig

    model = HuggingFaceLlama(shape, dtype_of(weights))
    model.load_from_tpformer(weights)
    model.to(device)
    # from_pretrained itself would want the package accelerate, and the weights in a file.
    config, _, mesh = model.causal.prepare_distribute_model(DistributedConfig(tp_size=degree))
    model.causal.maybe_distribute_model(model.causal, config, mesh)

    names = {name: renamed(name, MODULES, "model.layers") for name in from_tpformer(shape, weights)}

    def forward_backward(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = model.loss(tokens, targets)
        loss.backward()
        return loss.detach()

    def gradients() -> dict[str, Tensor]:
        theirs = whole_gradients(model.causal)
        return {name: theirs[their_name] for name, their_name in names.items()}

    return Step(model, forward_backward, gradients)
