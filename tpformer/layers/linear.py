"""The two tensor-parallel linear layers: columns in, rows out, one all-reduce between them and the next block."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tpformer.collectives import (
    Pending,
    all_reduce_,
    gather_features,
    split_features,
    start_enter,
    start_enter_gradient,
    start_scatter_sequence,
)
from tpformer.layers.init import draw_uniform
from tpformer.layers.product import Product
from tpformer.mesh import Mesh, divide
from tpformer.overlap import gather_matmul, matmul_scatter, overlap_mode
from tpformer.placement import Placement, replicated, split
from tpformer_kernels import Backend, after, apply, check_backend, fuses_activation, matmul, matmul_activation


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
        backend: Backend = "auto",
    ):
        super().__init__()
        check_backend(backend)
        self.mesh, self.gather_output, self.interleave, self.backend = mesh, gather_output, interleave, backend
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
        if mesh.sequence_parallel and mesh.tp.group is not None:
            overlap_mode(mesh)  # ask the ranks once, before a step

    def forward(self, x: Tensor, *, apart: bool = False, add_bias: bool = True, activation: str | None = None) -> Any:
        """(b, s, d) -> (b, s, f/tp), or (b, s, f) with gather_output; without add_bias the bias is left to the caller.

        apart: a tuple of `interleave` tensors (b, s, f/interleave/tp), a matmul each over a strided weight; on a CPU
        that is cheaper than to take the columns apart afterwards.
        activation: a pair, the output and its activation by the same kernel, (b, s, f/tp) or, of gate|up,
        (b, s, f/2/tp); the second is a constant to autograd. Only where `fuses` allows it.
        """
        bias = self.bias if add_bias else None
        product = Product.of(self, self.interleave if apart else 1, activation)
        outputs = apply(_ColumnLinear, x, self.weight, bias, product)
        if self.gather_output:
            outputs = tuple(gather_features(y, self.mesh.tp) for y in outputs)
        return outputs if apart or activation is not None else outputs[0]

    def fuses(self, x: Tensor) -> bool:
        """Whether the kernel that also activates is the faster one for x (b, s, d) or (b, s/tp, d), or asked for."""
        rows = x.shape[:-1].numel() * (self.mesh.tp.size if self.mesh.sequence_parallel else 1)
        plain = not self.gather_output and not Product(self.mesh, self.backend).overlaps()
        return plain and fuses_activation(x, rows, self.weight, self.interleave == 2, self.backend)


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
        backend: Backend = "auto",
    ):
        super().__init__()
        check_backend(backend)
        self.mesh, self.input_is_parallel, self.backend = mesh, input_is_parallel, backend
        local = divide(in_features, mesh.tp.size, "in_features")
        self.weight = nn.Parameter(torch.empty(out_features, local))
        self.placements = {"weight": split((out_features, in_features), 1, mesh.tp, local)}
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features))
            # after a reduce-scatter each rank adds the bias to its own tokens only
            self.placements["bias"] = replicated((out_features,), mesh.tp, partial=mesh.sequence_parallel)
        draw_uniform(self, self.placements, 1 / math.sqrt(in_features))
        if mesh.sequence_parallel and mesh.tp.group is not None:
            overlap_mode(mesh)  # ask the ranks once, before a step

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(b, s, d/tp) -> (b, s, f), or (b, s/tp, f) under sequence parallelism; plus a residual of that shape."""
        if not self.input_is_parallel:
            x = split_features(x, self.mesh.tp)
        product = Product.of(self)
        alike = all(added is None or added.dtype == x.dtype for added in (self.bias, residual))
        if self.mesh.tp.size == 1 and alike:  # with a wider one the sum is as wide
            return apply(_RowLinear, x, self.weight, self.bias, residual, product)
        y = apply(_RowLinear, x, self.weight, None, None, product)
        if self.mesh.tp.size > 1 and not product.overlaps():
            y = apply(_Leave, y, self.mesh)
        y = y if self.bias is None else y + self.bias
        return y if residual is None else y + residual


def column_linear(x: Tensor, weight: Tensor, mesh: Mesh, *, backend: Backend = "auto") -> Tensor:
    """Enter the tensor-parallel region and multiply by this rank's rows of a weight, which may have other uses.

    x (b, s, d) or (b, s/tp, d), weight (f/tp, d) -> (b, s, f/tp).
    """
    return apply(_ColumnLinear, x, weight, None, Product(mesh, backend))[0]


class _ColumnLinear(torch.autograd.Function):
    """Enter and matmul in one, so that the communication of backward runs beside its matmuls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> tuple[Tensor, ...]:
        ctx.product = product
        ctx.save_for_backward(x, weight)  # under sequence parallelism only (b, s/tp, d): gathered again in backward
        n, backend = product.interleave, product.backend
        biases = (None,) * n if bias is None else bias.unflatten(0, (-1, n)).unbind(1)
        # each output's rows are a strided matrix inside the weight, which BLAS multiplies where it lies
        parts = [w.t() for w in weight.unflatten(0, (-1, n)).unbind(1)]
        if product.overlaps():
            _, outputs = gather_matmul(_batched(x), parts, product.mesh)
            added = (y if b is None else y.add_(b) for y, b in zip(outputs, biases, strict=True))
            return tuple(y.view(*x.shape[:-2], *y.shape[1:]) for y in added)
        whole = start_enter(x, product.mesh).wait()
        flat = whole.reshape(-1, whole.shape[-1])
        if product.activation is None:
            outputs = [matmul(flat, w, b, backend=backend) for w, b in zip(parts, biases, strict=True)]
            return tuple(y.view(*whole.shape[:-1], y.shape[1]) for y in outputs)
        ctx.set_materialize_grads(False)  # autograd would fill one with zeros for the activation
        pair = matmul_activation(flat, parts[0], bias, product.activation, gated=product.gated)
        y, activated = (y.view(*whole.shape[:-1], y.shape[1]) for y in pair)
        ctx.mark_non_differentiable(activated)
        return y, activated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        product: Product = ctx.product
        grads = grads[: product.interleave]  # the activation has none
        if product.activation is not None and grads[0] is None:
            return None, None, None, None
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        whole_x = start_enter(_in_backward(x, grads[0], product), product.mesh) if needs_weight else None
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in grads]  # (b·s, f/interleave/tp)
        dx = dweight = dbias = None
        if needs_x and product.overlaps():
            dy = grads[0] if len(grads) == 1 else torch.stack(grads, dim=-1).flatten(-2)  # as the weight's rows lie
            dx = Pending(None, matmul_scatter(_batched(dy), weight, product.mesh).view(x.shape))
        elif needs_x:
            parts = weight.unflatten(0, (-1, product.interleave)).unbind(1)
            partial = matmul(dys[0], parts[0], backend=product.backend)
            for dy, w in zip(dys[1:], parts[1:], strict=True):
                partial = matmul(dy, w, residual=partial, backend=product.backend)
            dx = start_enter_gradient(partial.view(*grads[0].shape[:-1], weight.shape[1]), product.mesh)
        if whole_x is not None:
            dweight = product.weight_gradient(weight, dys, whole_x.wait().reshape(-1, weight.shape[1]))
        if needs_bias:
            dbias = torch.stack([dy.sum(0) for dy in dys], dim=1).flatten()
        return dx.wait() if dx else None, dweight, dbias, None


class _RowLinear(torch.autograd.Function):
    """Matmul only; bias and residual where there is no sum to come. With overlap the sum is part of the matmul.

    Leaving is a Function of its own, because autograd takes what a Function saves after its forward: recomputation,
    which stops at the last saved tensor, would otherwise communicate a sum that nobody reads.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, product: Product
    ) -> Tensor:
        ctx.product = product
        ctx.save_for_backward(x, weight)
        if product.overlaps():
            y = matmul_scatter(_batched(x), weight.t(), product.mesh)
            return y.view(*x.shape[:-2], *y.shape[1:])
        added = None if residual is None else residual.reshape(-1, residual.shape[-1])
        flat = x.reshape(-1, x.shape[-1])
        return matmul(flat, weight.t(), bias, added, backend=product.backend).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        product: Product = ctx.product
        needs_x, needs_weight, needs_bias, needs_residual, _ = ctx.needs_input_grad
        whole, dx = dy, None
        if product.overlaps():
            if needs_x:
                whole, (dx,) = gather_matmul(_batched(dy), [weight], product.mesh)
            else:
                whole = start_enter(dy, product.mesh).wait()
        flat = whole.reshape(-1, dy.shape[-1])  # (b·s, f)
        if needs_x:
            dx = (matmul(flat, weight, backend=product.backend) if dx is None else dx).view(x.shape)
        dweight = product.weight_gradient(weight, [flat], x.reshape(-1, x.shape[-1])) if needs_weight else None
        return dx, dweight, flat.sum(0) if needs_bias else None, dy if needs_residual else None, None


class _Leave(torch.autograd.Function):
    """Sum the ranks' products, which are nobody else's: in place, or scattered along the sequence."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        if mesh.sequence_parallel:
            return start_scatter_sequence(y, mesh.tp).wait()
        return all_reduce_(y.detach(), mesh.tp)  # its memory, without its history, which a view may not change in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return start_enter(dy, ctx.mesh).wait(), None


def _in_backward(x: Tensor, dy: Tensor, product: Product) -> Tensor:
    """x, to be gathered again: a compiler would rather gather it once, and keep it whole from forward to backward."""
    return after(x, dy) if torch.compiler.is_compiling() and product.mesh.sequence_parallel else x


def _batched(x: Tensor) -> Tensor:
    """x (..., s, d) as (b, s, d)."""
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
