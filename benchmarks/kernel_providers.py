"""The contenders of the kernel benchmark: each op by tpformer, in plain torch, compiled by torch, and by Liger.

A baseline gets the layout that suits it best: gate and up apart, rotation tables in the dtype of the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tpformer_kernels as ours
from tpformer.layers.cross_entropy import vocab_parallel_cross_entropy
from tpformer.layers.linear_cross_entropy import vocab_parallel_linear_cross_entropy

Leaves = tuple[Tensor, ...]
Outputs = Tensor | tuple[Tensor, ...]

OURS, EAGER, COMPILED, LIGER = "tpformer", "torch", "torch.compile", "liger"
LIGER_MEGATRON, MATMULS = "liger megatron", "3 x torch.mm"
FLASH, CUDNN, EFFICIENT = "torch flash", "torch cuDNN", "torch efficient"
NAMES = (OURS, EAGER, COMPILED, LIGER, LIGER_MEGATRON, MATMULS, FLASH, CUDNN, EFFICIENT)
EPS, DROPOUT = 1e-5, 0.1
PLACE = (1234, 0, 0)  # dropout's seed and position


def unchanged(*leaves: Tensor) -> Leaves:
    """The op's own layout."""
    return leaves


@dataclass(frozen=True)
class Provider:
    """One way to compute an op."""

    name: str
    run: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    """The same in plain torch, called with fp32 copies of the same leaves."""
    wanted: int
    """How many of the leaves, from the first, get gradients; 0: only the call itself counts, and is not checked."""
    arrange: Callable[..., Leaves] = unchanged
    """The op's tensors in the layout that `run` takes; not timed."""
    observed: bool = False
    """The reference also takes grads=, the gradients that `run` led to: they show what was dropped."""


def baselines(eager: Callable[..., Outputs], wanted: int, arrange: Callable[..., Leaves] = unchanged) -> list[Provider]:
    """Plain torch, as it is and compiled."""

    @cache
    def compile_now() -> Callable[..., Outputs]:
        from torch._functorch import config

        config.donated_buffer = False  # else a graph that is kept for another backward raises
        return torch.compile(eager, dynamic=False, fullgraph=True)

    def compiled(*leaves: Tensor) -> Outputs:
        return compile_now()(*leaves)

    return [
        Provider(EAGER, eager, eager, wanted, arrange),
        Provider(COMPILED, compiled, eager, wanted, arrange),
    ]


def liger(
    run: Callable[..., Outputs],
    reference: Callable[..., Outputs],
    wanted: int,
    arrange: Callable[..., Leaves] = unchanged,
) -> list[Provider]:
    """Liger, where it is installed."""
    return [Provider(LIGER, run, reference, wanted, arrange)] if find_spec("liger_kernel") else []


def liger_function(name: str) -> Callable[..., Any]:
    """One of Liger's functions; imported late, because it takes seconds and is optional."""
    return getattr(import_module("liger_kernel.transformers.functional"), name)


def norm(residual: bool, center: bool) -> tuple[Provider, ...]:
    """RMSNorm or (center) LayerNorm of (x, [residual], weight, [bias])."""

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if center:
            return F.layer_norm(x, weight.shape, weight, bias, EPS)
        return F.rms_norm(x, weight.shape, weight, EPS)

    def plain_add(x: Tensor, residual: Tensor, *parameters: Tensor) -> Outputs:
        total = x + residual
        return plain(total, *parameters), total

    def fused(*leaves: Tensor) -> Outputs:
        name = f"{'add_' if residual else ''}{'layer' if center else 'rms'}_norm"
        return getattr(ours, name)(*leaves, EPS)

    def by_liger(*leaves: Tensor) -> Outputs:
        if center:
            return liger_function("liger_layer_norm")(*leaves, EPS)
        # in place it would write the gradient over the one it is given
        return liger_function(f"liger_{'fused_add_' if residual else ''}rms_norm")(*leaves, EPS, in_place=False)

    eager = plain_add if residual else plain
    wanted = 2 + residual + center
    also = [] if residual and center else liger(by_liger, eager, wanted)  # Liger has no LayerNorm with an add
    return (Provider(OURS, fused, eager, wanted), *baselines(eager, wanted), *also)


def rope() -> tuple[Provider, ...]:
    """Queries, keys and values out of a packed projection, rotated; (qkv, cos, sin)."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def eager(qkv: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
        q, k, v = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def by_liger(qkv: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
        """Takes no packed projection: the copies that take it apart, in place from there on, are timed."""
        q, k, v = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        q, k = liger_function("liger_rope")(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), v

    def narrow(qkv: Tensor, cos: Tensor, sin: Tensor) -> Leaves:
        return qkv, cos.to(qkv.dtype), sin.to(qkv.dtype)

    def doubled(qkv: Tensor, cos: Tensor, sin: Tensor) -> Leaves:
        return qkv, *(x.to(qkv.dtype).squeeze(1).repeat(1, 2).unsqueeze(0) for x in (cos, sin))

    def eager_doubled(qkv: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
        return eager(qkv, *(x.squeeze(0).chunk(2, dim=-1)[0].unsqueeze(1) for x in (cos, sin)))

    mine = Provider(OURS, ours.split_and_rotate, eager, 1)
    return (mine, *baselines(eager, 1, narrow), *liger(by_liger, eager_doubled, 1, doubled))


def swiglu() -> tuple[Provider, ...]:
    """silu(gate) · up of interleaved pairs; the baselines take gate and up apart."""

    def eager(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def apart(pairs: Tensor) -> Leaves:
        gate, up = pairs.unflatten(-1, (-1, 2)).unbind(-1)
        return gate.contiguous(), up.contiguous()

    def fused(pairs: Tensor) -> Outputs:
        return ours.gated_activation(pairs, "silu")

    def by_liger(gate: Tensor, up: Tensor) -> Outputs:
        return liger_function("liger_swiglu")(gate, up)

    mine = Provider(OURS, fused, lambda pairs: eager(*apart(pairs)), 1)
    return (mine, *baselines(eager, 2, apart), *liger(by_liger, eager, 2, apart))


def bias_gelu() -> tuple[Provider, ...]:
    """gelu(x + bias), by erf."""

    def eager(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias)

    return (Provider(OURS, ours.bias_gelu, eager, 2), *baselines(eager, 2))


def dropout_add() -> tuple[Provider, ...]:
    """residual + dropout(x); torch draws other numbers, so that its gradients tell what to compare with."""

    def eager(x: Tensor, residual: Tensor) -> Tensor:
        return residual + F.dropout(x, DROPOUT)

    def fused(x: Tensor, residual: Tensor) -> Outputs:
        return ours.dropout_add(x, residual, DROPOUT, PLACE)

    def reference(x: Tensor, residual: Tensor) -> Outputs:
        return ours.dropout_add(x, residual, DROPOUT, PLACE, backend="torch")

    def observed(x: Tensor, residual: Tensor, grads: Leaves) -> Outputs:
        kept = grads[0] != 0
        dropped = 1 - float(kept.float().mean())
        if abs(dropped - DROPOUT) > 5 * (DROPOUT / kept.numel()) ** 0.5 + 1e-4:
            raise ValueError(f"dropped {dropped:.4f} of the numbers instead of {DROPOUT}")
        return residual + torch.where(kept, x / (1 - DROPOUT), 0.0)

    others = [Provider(p.name, p.run, observed, 2, observed=True) for p in baselines(eager, 2)]
    return (Provider(OURS, fused, reference, 2), *others)


def softmax() -> tuple[Provider, ...]:
    """Scaled, causal softmax of square scores."""
    scale = 0.125

    def eager(x: Tensor) -> Tensor:
        seen = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril()
        return (x * scale).masked_fill(~seen, -torch.inf).softmax(-1)

    def fused(x: Tensor) -> Tensor:
        return ours.softmax(x, scale=scale, causal=True)

    return (Provider(OURS, fused, eager, 1), *baselines(eager, 1))


def cross_entropy(inplace: bool = True) -> tuple[Provider, ...]:
    """Mean loss of (logits, targets); Liger's own, and its vocabulary-parallel one for Megatron."""

    def eager(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    def fused(logits: Tensor, targets: Tensor) -> Outputs:
        return vocab_parallel_cross_entropy(logits, targets, inplace=inplace)

    def by_liger(logits: Tensor, targets: Tensor) -> Outputs:
        return liger_function("liger_cross_entropy")(logits, targets)

    def by_liger_megatron(logits: Tensor, targets: Tensor) -> Outputs:
        module = import_module("liger_kernel.megatron.cross_entropy").LigerMegatronCrossEntropy()
        return module(logits.unsqueeze(1), targets.unsqueeze(1)).mean()

    also = liger(by_liger, eager, 1)
    if also:
        also.append(Provider(LIGER_MEGATRON, by_liger_megatron, eager, 1))
    return (Provider(OURS, fused, eager, 1), *baselines(eager, 1), *also)


def linear_cross_entropy() -> tuple[Provider, ...]:
    """Mean loss of (x, weight, targets); beside it the three bare matmuls, to which any loss has to add something."""

    def eager(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x.flatten(0, 1), weight), targets.flatten())

    def fused(x: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
        return vocab_parallel_linear_cross_entropy(x, weight, targets)

    def by_liger(x: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
        return liger_function("liger_fused_linear_cross_entropy")(x.flatten(0, 1), weight, targets.flatten())

    def matmuls(x: Tensor, weight: Tensor, gradient: Tensor) -> Outputs:
        return torch.mm(x, weight.t()), torch.mm(gradient, weight), torch.mm(gradient.t(), x)

    def with_gradient(x: Tensor, weight: Tensor, targets: Tensor) -> Leaves:
        # random like real ones: a product of zeros takes less time
        return x.flatten(0, 1), weight, torch.randn(targets.numel(), len(weight), dtype=x.dtype, device=x.device)

    mine = Provider(OURS, fused, eager, 2)
    bare = Provider(MATMULS, matmuls, matmuls, 0, with_gradient)
    return (mine, *baselines(eager, 2), *liger(by_liger, eager, 2), bare)
