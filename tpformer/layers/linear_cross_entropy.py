"""The output head and its cross entropy in one, a chunk of tokens at a time: whole logits never exist.

Gradients are computed in forward, while a chunk's logits are there: three matmuls and no recomputation. They are
those of the *sum* of the losses, so that fp16 keeps its range; backward scales them.
Sources: Liger Kernel (arXiv 2410.10989), for gradients in forward; NVIDIA TransformerEngine, for the packed exchange.
"""

from collections.abc import Iterator
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpformer.collectives import Pending, start_enter, start_enter_gradient, start_gather_stack
from tpformer.layers.cross_entropy import Loss, LossOptions
from tpformer.mesh import Mesh
from tpformer_kernels import IGNORED, Backend, accumulate_, matmul, prefers_onednn

LEAST_CHUNK = 256 * 2**20
"""Bytes of a chunk of logits, at least, by default: fewer tokens would make poor matmuls and many collectives."""

Chunk = tuple[slice, Tensor, Tensor, Tensor]
"""The tokens; their logits, which a later chunk overwrites; their losses; their log-sum-exp."""


def vocab_parallel_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    mesh: Mesh = Mesh(),
    *,
    chunk_bytes: int | None = None,
    **options: Unpack[LossOptions],
) -> Tensor:
    """Cross entropy of logits x Wᵀ in nats; by default its mean over the targets that are not ignored, 0 if all are.

    x[B, S, D], under sequence parallelism x[B, S_tp, D]; weight[V_tp, D]; targets[B, S] int64 with ids of the whole
    vocabulary, the same on every tp rank. chunk_bytes: of one chunk of logits (with tp > 1 two are there at a time);
    by default as many as the weight has: each chunk reads and writes the whole gradient of the weight, in fp32.
    options: those of vocab_parallel_cross_entropy. Backward runs once; with reduction="none" it computes the logits
    again, and may run again.
    Raises ValueError for sizes that do not fit and, on CPU, for a target outside the vocabulary.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(f"x {tuple(x.shape)} must be (b, s, d) and weight {tuple(weight.shape)} (v, d)")
    length = x.shape[1] * (mesh.tp.size if mesh.sequence_parallel else 1)
    if tuple(targets.shape) != (x.shape[0], length):
        raise ValueError(f"targets {tuple(targets.shape)} must be (b, s), here ({x.shape[0]}, {length})")
    if chunk_bytes is None:
        chunk_bytes = max(LEAST_CHUNK, weight.nbytes)
    elif chunk_bytes < 1:
        raise ValueError(f"chunk_bytes ({chunk_bytes}) must be at least 1")
    loss = Loss(mesh, weight.shape[0], **options)
    local = loss.local_targets(targets.flatten())
    if loss.reduction == "none":
        return _Recomputing.apply(x, weight, local, loss, chunk_bytes).view(targets.shape)
    return _LinearCrossEntropy.apply(x, weight, local, loss, chunk_bytes, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, local: Tensor, loss: Loss, chunk_bytes: int, training: bool
    ) -> Tensor:
        whole = start_enter(x, loss.mesh).wait()
        flat = whole.flatten(0, 1)  # (n, d)
        needed = [training and needed for needed in ctx.needs_input_grad[:2]]
        sums = _Gradients(flat, weight, needed, chunk_bytes, loss.backend)
        ones = (local != IGNORED).to(_wide(x))
        losses = torch.empty_like(ones)
        for rows, logits, found, lse in _chunks(flat, weight, local, loss, chunk_bytes):
            losses[rows] = found
            if any(needed):
                sums.add(rows, loss.gradient(logits, local[rows], lse, ones[rows], inplace=True))
            del logits  # before the next chunk's
        ctx.loss, ctx.shape, ctx.spent = loss, whole.shape, False
        ctx.dtype = weight.dtype
        factor = loss.factor(local, losses.dtype)
        ctx.save_for_backward(sums.dx, sums.dweight, factor)
        return losses.sum() * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("backward through this loss a second time: its gradients have been handed over")
        ctx.spent = True
        dx, dweight, factor = ctx.saved_tensors
        scale = (grad * factor).view(1, 1)  # fp32: a number without dims would be rounded to dx's dtype first
        pending = None
        if dx is not None:
            pending = start_enter_gradient(torch.mul(dx, scale, out=dx).view(ctx.shape), ctx.loss.mesh)
        if dweight is not None:
            out = dweight if dweight.dtype == ctx.dtype else dweight.new_empty(dweight.shape, dtype=ctx.dtype)
            dweight = torch.mul(dweight, scale, out=out)
        return None if pending is None else pending.wait(), dweight, None, None, None, None


class _Recomputing(torch.autograd.Function):
    """For one gradient a token, which forward does not know: backward computes the logits again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, local: Tensor, loss: Loss, chunk_bytes: int) -> Tensor:
        whole = start_enter(x, loss.mesh).wait()
        flat = whole.flatten(0, 1)  # (n, d)
        losses = torch.empty(local.shape, dtype=_wide(x), device=x.device)
        sums = torch.empty_like(losses)
        for rows, _, found, lse in _chunks(flat, weight, local, loss, chunk_bytes):
            losses[rows], sums[rows] = found, lse
        ctx.loss, ctx.chunk_bytes, ctx.shape = loss, chunk_bytes, whole.shape
        ctx.save_for_backward(x, weight, local, sums)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, local, sums = ctx.saved_tensors
        flat = start_enter(x, ctx.loss.mesh).wait().flatten(0, 1)
        found = _Gradients(flat, weight, ctx.needs_input_grad[:2], ctx.chunk_bytes, ctx.loss.backend)
        scale = grad.masked_fill(local == IGNORED, 0.0)
        for rows in _slices(flat, weight, ctx.chunk_bytes):
            logits = matmul(flat[rows], weight.t(), backend=ctx.loss.backend)
            found.add(rows, ctx.loss.gradient(logits, local[rows], sums[rows], scale[rows], inplace=True))
            del logits  # before the next chunk's
        pending = None if found.dx is None else start_enter_gradient(found.dx.view(ctx.shape), ctx.loss.mesh)
        dweight = None if found.dweight is None else found.dweight.to(weight.dtype)
        return None if pending is None else pending.wait(), dweight, None, None, None


def _chunks(flat: Tensor, weight: Tensor, local: Tensor, loss: Loss, chunk_bytes: int) -> Iterator[Chunk]:
    """One chunk of tokens (n, d) after another; while one's statistics travel, the next one's logits are computed."""
    tp = loss.mesh.tp
    ahead = 1 if tp.size > 1 else 0  # chunks under way beside the one handed out
    slices = _slices(flat, weight, chunk_bytes)
    size = slices[0].stop if slices else 0
    # oneDNN brings memory of its own
    count = 0 if prefers_onednn(flat[:size], weight.t()) else min(1 + ahead, len(slices))
    buffers = [flat.new_empty(size, len(weight)) for _ in range(count)]
    waiting: list[tuple[slice, Tensor, Pending]] = []
    for number, rows in enumerate(slices):
        out = buffers[number % count][: rows.stop - rows.start] if buffers else None
        logits = matmul(flat[rows], weight.t(), out=out, backend=loss.backend)
        waiting.append((rows, logits, start_gather_stack(loss.statistics(logits, local[rows]), tp)))
        del logits, out
        if len(waiting) > ahead:
            yield _arrived(*waiting.pop(0), local, loss)
    for chunk in waiting:
        yield _arrived(*chunk, local, loss)


def _arrived(rows: slice, logits: Tensor, statistics: Pending, local: Tensor, loss: Loss) -> Chunk:
    return rows, logits, *loss.combine(statistics.wait(), local[rows])


def _slices(flat: Tensor, weight: Tensor, chunk_bytes: int) -> list[slice]:
    """As many tokens a chunk as the bytes allow, but at least one; the same on every rank."""
    tokens = len(flat)
    step = max(1, chunk_bytes // (len(weight) * flat.element_size()))
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


class _Gradients:
    """dx (n, d), chunk by chunk, and dweight (v/tp, d), summed over the chunks; None for what nobody wants."""

    def __init__(self, flat: Tensor, weight: Tensor, needed: Any, chunk_bytes: int, backend: Backend):
        self.dx: Tensor | None = flat.new_empty(flat.shape) if needed[0] else None  # contiguous, whatever flat is
        self.dweight: Tensor | None = None
        self._flat, self._weight, self._backend = flat, weight, backend
        # a single chunk's sum is rounded once in any case; fp16 could not hold it before it is scaled
        chunks = len(_slices(flat, weight, chunk_bytes))
        self._at_once = needed[1] and chunks == 1 and weight.dtype != torch.float16
        if needed[1] and not self._at_once:
            # fp32 at least; without a chunk nothing will be written to it
            fresh = weight.new_empty if chunks else weight.new_zeros
            self.dweight = fresh(weight.shape, dtype=_wide(weight))

    def add(self, rows: slice, gradient: Tensor) -> None:
        """Take the gradient of the logits (rows, v/tp) of some tokens."""
        if self.dx is not None:
            matmul(gradient, self._weight, out=self.dx[rows], backend=self._backend)
        if self._at_once:
            self.dweight = matmul(gradient.t(), self._flat[rows], backend=self._backend)
        elif self.dweight is not None:
            accumulate_(self.dweight, gradient, self._flat[rows], rows.start == 0, backend=self._backend)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
