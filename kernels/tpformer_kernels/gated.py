"""Gated activations, SwiGLU and GeGLU (arXiv 2002.05202), with a backward that keeps only its two inputs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up, elementwise; activation "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU)."""
    return _Gated.apply(gate, up, activation)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return _activate(gate, activation).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dup = _activate(gate, ctx.activation).mul_(dy)
        if ctx.activation == "silu":
            dgate = torch.ops.aten.silu_backward(dy * up, gate)
        else:
            approximate = "tanh" if ctx.activation == "gelu_tanh" else "none"
            dgate = torch.ops.aten.gelu_backward(dy * up, gate, approximate=approximate)
        return dgate, dup, None


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
