"""Gated activations, SwiGLU and GeGLU (arXiv 2002.05202), whose backward keeps only their input.

Forward reads two numbers and writes one, backward reads three and writes two.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpformer_kernels.apply import apply
from tpformer_kernels.backend import Backend, use_triton
from tpformer_kernels.jit import jit, tl, triton
from tpformer_kernels.library import launch, operator
from tpformer_kernels.tables import options

GATES = ("silu", "gelu", "gelu_tanh")


def gated_activation(
    gate_up: Tensor, activation: str, *, computed: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """act(gate) · up of pairs that lie side by side: x[..., 2i] is the gate of x[..., 2i + 1]; (..., 2f) -> (..., f).

    activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU). computed: the result, if matmul_activation gave it.
    Raises ValueError for another activation, or for an odd last dim.
    """
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"the last dim of gate_up {tuple(gate_up.shape)} must be even: a gate and an up each")
    if use_triton(backend, gate_up):
        return apply(_GatedPairs, gate_up, _number(activation), computed)
    return gated_product(gate_up[..., 0::2], gate_up[..., 1::2], activation)


def gated_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up of two tensors in plain torch: the definition of gated_activation."""
    _number(activation)
    return apply(_GatedProduct, gate, up, activation)


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return activate(gate, activation).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dup = activate(gate, ctx.activation).mul_(dy)
        if ctx.activation == "silu":
            dgate = torch.ops.aten.silu_backward(dy * up, gate)
        else:
            approximate = "tanh" if ctx.activation == "gelu_tanh" else "none"
            dgate = torch.ops.aten.gelu_backward(dy * up, gate, approximate=approximate)
        return dgate, dup, None


class _GatedPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: int, computed: Tensor | None) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate_up)
        return gated_forward(gate_up, activation) if computed is None else computed.view_as(computed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (gate_up,) = ctx.saved_tensors
        return gated_backward(dy, gate_up, ctx.activation), None, None


def activate(x: Tensor, activation: str) -> Tensor:
    """One of GATES of x, in plain torch."""
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _number(activation: str) -> int:
    if activation not in GATES:
        raise ValueError(f"activation ({activation!r}) must be one of {', '.join(GATES)}")
    return GATES.index(activation)


@operator("gated_forward(Tensor gate_up, int activation) -> Tensor", lambda gate_up, activation: _half(gate_up))
def gated_forward(gate_up: Tensor, activation: int) -> Tensor:
    gate_up = gate_up.contiguous()
    y = _half(gate_up)
    meta = options("gated_forward", y.numel(), y.device)
    grid = (triton.cdiv(y.numel(), meta["BLOCK"]),)
    launch(_gated_forward_kernel, grid, gate_up, y, y.numel(), ACTIVATION=activation, **meta)
    return y


@operator(
    "gated_backward(Tensor dy, Tensor gate_up, int activation) -> Tensor",
    lambda dy, gate_up, activation: gate_up.new_empty(gate_up.shape),
)
def gated_backward(dy: Tensor, gate_up: Tensor, activation: int) -> Tensor:
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    out = torch.empty_like(gate_up)
    meta = options("gated_backward", dy.numel(), dy.device)
    grid = (triton.cdiv(dy.numel(), meta["BLOCK"]),)
    launch(_gated_backward_kernel, grid, dy, gate_up, out, dy.numel(), ACTIVATION=activation, **meta)
    return out


def _half(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@jit
def activate_block(x, ACTIVATION: tl.constexpr):
    """act(x) in fp32; the tanh form is x · sigmoid(2u), because (1 + tanh u) / 2 = sigmoid(2u)."""
    if ACTIVATION == 0:
        return x * tl.sigmoid(x)
    if ACTIVATION == 1:
        return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@jit
def activate_slope(x, ACTIVATION: tl.constexpr):
    """d act(x) / dx in fp32."""
    if ACTIVATION == 0:
        s = tl.sigmoid(x)
        return s + x * s * (1 - s)
    if ACTIVATION == 1:
        return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)


@jit
def _gated_forward_kernel(pairs_ptr, y_ptr, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK neighbouring pairs, read as one piece of memory."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    both = 2 * start + tl.arange(0, 2 * BLOCK)
    inside = both < tl.full((), 2, tl.int64) * size
    pairs = tl.load(pairs_ptr + both, inside, 0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(pairs, (BLOCK, 2)))
    offset = start + tl.arange(0, BLOCK)
    y = activate_block(gate, ACTIVATION) * up
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), offset < size)


@jit
def _gated_backward_kernel(dy_ptr, pairs_ptr, out_ptr, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK neighbouring pairs; the gradients of gate and up are written side by side as well."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    both = 2 * start + tl.arange(0, 2 * BLOCK)
    offset = start + tl.arange(0, BLOCK)
    inside = both < tl.full((), 2, tl.int64) * size
    pairs = tl.load(pairs_ptr + both, inside, 0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(pairs, (BLOCK, 2)))
    dy = tl.load(dy_ptr + offset, offset < size, 0.0).to(tl.float32)
    grads = tl.join(dy * up * activate_slope(gate, ACTIVATION), dy * activate_block(gate, ACTIVATION))
    tl.store(out_ptr + both, tl.reshape(grads, (2 * BLOCK,)).to(out_ptr.dtype.element_ty), inside)
