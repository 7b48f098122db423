"""The two tensor-parallel linear layers: columns in, rows out, one all-reduce between them and the next block."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tpformer.collectives import (
    all_reduce_,
    gather_features,
    split_features,
    start_enter,
    start_enter_gradient,
    start_scatter_sequence,
)
from tpformer.layers.init import draw_uniform
from tpformer.mesh import Mesh, divide
from tpformer.placement import Placement, replicated, split


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + b with W's rows (the output features) split over tp; pairs with RowParallelLinear.

    x[B, S, D] · W[D, F_tp] -> y[B, S, F_tp], or y[B, S, F] with gather_output. Under sequence parallelism x is
    x[B, S_tp, D]. Backward sums dx over tp, while it computes dW.
    interleave: how many outputs share the weight, row by row (gate|up), for forward to return each by itself.
    rows: a placement of the weight's rows other than an even split (copied key and value heads).
    Raises ValueError if out_features is not divisible by tp. Source: arXiv 1909.08053, section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mesh: Mesh = Mesh(),
        gather_output: bool = False,
        interleave: int = 1,
        rows: Placement | None = None,
    ):
        super().__init__()
        self.mesh, self.gather_output, self.interleave = mesh, gather_output, interleave
        if rows is None:
            divide(out_features, interleave, "out_features", "interleave")
            whole_rows = "tp" if interleave == 1 else "interleave x tp"
            local = interleave * divide(out_features, interleave * mesh.tp.size, "out_features", whole_rows)
            rows = split((out_features, in_features), 0, mesh.tp, local)
        local = sum(piece.size for piece in rows.pieces)
        self.weight = nn.Parameter(torch.empty(local, in_features))
        self.placements = {"weight": rows}
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(local))
            self.placements["bias"] = Placement(rows.shape[:1], 0, rows.pieces, rows.partial)
        draw_uniform(self, self.placements, 1 / math.sqrt(in_features))

    def forward(self, x: Tensor, *, apart: bool = False, add_bias: bool = True) -> Any:
        """(b, s, d) -> (b, s, f/tp), or (b, s, f) with gather_output; without add_bias the bias is left to the caller.

        apart: a tuple of `interleave` tensors (b, s, f/interleave/tp), a matmul each over a strided weight; on a CPU
        that is cheaper than to take the columns apart afterwards.
        """
        bias = self.bias if add_bias else None
        outputs = column_linear(x, self.weight, bias, self.mesh, self.interleave if apart else 1)
        if self.gather_output:
            outputs = tuple(gather_features(y, self.mesh.tp) for y in outputs)
        return outputs if apart else outputs[0]


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + b with W's columns (the input features) split over tp; the ranks' partial results are summed.

    x[B, S, D_tp] · W[D_tp, F] -> y[B, S, F] {summed over tp}; under sequence parallelism y[B, S_tp, F].
    With input_is_parallel=False x is the whole x[B, S, D] and each rank takes its part.
    The bias is added once, after the sum.
    Raises ValueError if in_features is not divisible by tp. Source: arXiv 1909.08053, section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mesh: Mesh = Mesh(),
        input_is_parallel: bool = True,
    ):
        super().__init__()
        self.mesh, self.input_is_parallel = mesh, input_is_parallel
        local = divide(in_features, mesh.tp.size, "in_features")
        self.weight = nn.Parameter(torch.empty(out_features, local))
        self.placements = {"weight": split((out_features, in_features), 1, mesh.tp, local)}
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features))
            # after a reduce-scatter each rank adds the bias to its own tokens only
            self.placements["bias"] = replicated((out_features,), mesh.tp, partial=mesh.sequence_parallel)
        draw_uniform(self, self.placements, 1 / math.sqrt(in_features))

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, d/tp) -> (b, s, f), or (b, s/tp, f) under sequence parallelism."""
        if not self.input_is_parallel:
            x = split_features(x, self.mesh.tp)
        if self.mesh.tp.size == 1:
            return F.linear(x, self.weight, self.bias)
        y = _RowLinear.apply(x, self.weight, self.mesh)
        return y if self.bias is None else y + self.bias


def column_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, mesh: Mesh, interleave: int = 1
) -> tuple[Tensor, ...]:
    """Enter the tensor-parallel region and multiply by this rank's rows of the weight.

    x (b, s, d) or (b, s/tp, d), weight (f/tp, d) -> `interleave` tensors (b, s, f/interleave/tp).
    """
    if mesh.tp.size == 1 and interleave == 1:
        return (F.linear(x, weight, bias),)
    return _ColumnLinear.apply(x, weight, bias, mesh, interleave)


class _ColumnLinear(torch.autograd.Function):
    """Enter and matmul in one, so that the communication of backward runs beside its matmuls."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mesh: Mesh, interleave: int
    ) -> tuple[Tensor, ...]:
        ctx.mesh, ctx.interleave = mesh, interleave
        ctx.save_for_backward(x, weight)  # under sequence parallelism only (b, s/tp, d): gathered again in backward
        biases = (None,) * interleave if bias is None else bias.unflatten(0, (-1, interleave)).unbind(1)
        x = start_enter(x, mesh).wait()
        # each output's rows are a strided matrix inside the weight, which BLAS multiplies where it lies
        parts = weight.unflatten(0, (-1, interleave)).unbind(1)
        return tuple(F.linear(x, w, b) for w, b in zip(parts, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        mesh, interleave = ctx.mesh, ctx.interleave
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        whole_x = start_enter(x, mesh) if needs_weight else None
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in grads]  # (b·s, f/interleave/tp)
        dx = None
        if needs_x:
            parts = weight.unflatten(0, (-1, interleave)).unbind(1)
            partial = dys[0] @ parts[0]
            for dy, w in zip(dys[1:], parts[1:], strict=True):
                partial.addmm_(dy, w)
            dx = start_enter_gradient(partial.view(*grads[0].shape[:-1], -1), mesh)
        dweight = dbias = None
        if whole_x is not None:
            flat = whole_x.wait().reshape(-1, weight.shape[1])
            dweight = torch.empty_like(weight)
            for dy, dw in zip(dys, dweight.unflatten(0, (-1, interleave)).unbind(1), strict=True):
                torch.mm(dy.t(), flat, out=dw)
        if needs_bias:
            dbias = torch.stack([dy.sum(0) for dy in dys], dim=1).flatten()
        return dx.wait() if dx else None, dweight, dbias, None, None


class _RowLinear(torch.autograd.Function):
    """Matmul and leave in one, so that the sum is made in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        ctx.save_for_backward(x, weight)
        y = F.linear(x, weight)  # (b, s, f), a part of the sum
        return start_scatter_sequence(y, mesh.tp).wait() if mesh.sequence_parallel else all_reduce_(y, mesh.tp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = start_enter(dy, ctx.mesh).wait()  # (b, s, f)
        flat = dy.reshape(-1, dy.shape[-1])
        dx = (flat @ weight).view_as(x) if ctx.needs_input_grad[0] else None
        dweight = flat.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return dx, dweight, None
