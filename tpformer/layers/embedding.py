"""The token embedding and the output head, their vocabulary split over tp."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tpformer.collectives import all_reduce_, start_gather_sequence, start_scatter_sequence
from tpformer.layers.init import draw_normal, draw_uniform, fresh_key
from tpformer.layers.linear import column_linear
from tpformer.mesh import Mesh
from tpformer.placement import replicated, split
from tpformer_kernels import Backend, check_backend

VOCAB_MULTIPLE = 128
"""Vocabularies are padded to a multiple of this, the same at any tp; the padding is always zero."""


def padded_vocab(vocab_size: int, tp: int) -> int:
    """The rows that a vocabulary takes, padding included.

    Raises ValueError if tp does not divide them.
    """
    padded = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if padded % tp:
        raise ValueError(f"padded vocabulary ({padded}, for {vocab_size}) must be divisible by tp ({tp})")
    return padded


class VocabParallelEmbedding(nn.Module):
    """tokens[B, S] -> x[B, S, D]; each rank looks up its own slice of the vocabulary, the others give zeros.

    W[V_tp, D]; the sum over tp is the one collective (a reduce-scatter to x[B, S_tp, D] under sequence
    parallelism). Raises ValueError if the padded vocabulary is not divisible by tp.
    Source: arXiv 1909.08053, section 3.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, mesh: Mesh = Mesh()):
        super().__init__()
        self.mesh = mesh
        local = padded_vocab(num_embeddings, mesh.tp.size) // mesh.tp.size
        self.weight = nn.Parameter(torch.empty(local, embedding_dim))
        self.placements = {"weight": split((num_embeddings, embedding_dim), 0, mesh.tp, local)}
        if not self.weight.is_meta:  # N(0, 1), as in torch.nn.Embedding
            draw_normal(self.weight, self.placements["weight"], fresh_key(), 1.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (b, s) -> (b, s, d), or (b, s/tp, d) under sequence parallelism.

        Raises ValueError, on CPU, for a token outside the vocabulary.
        """
        self._check(tokens)
        return _VocabParallelLookup.apply(tokens, self.weight, self.mesh)

    def _check(self, tokens: Tensor) -> None:
        """No rank owns a token outside the vocabulary: it would silently be embedded as zero."""
        vocab_size = self.placements["weight"].shape[0]
        wrong = (tokens < 0) | (tokens >= vocab_size)
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            torch._assert_async(~wrong.any())  # no wait for the device
        elif wrong.any():
            raise ValueError(f"token {int(tokens[wrong][0])} must be in 0..{vocab_size - 1} (vocab_size {vocab_size})")


class VocabParallelHead(nn.Module):
    """x[B, S, D] -> logits[B, S, V_tp] by a matrix of its own (untied); its padding rows stay zero.

    Raises ValueError if the padded vocabulary is not divisible by tp.
    """

    def __init__(self, embedding_dim: int, num_embeddings: int, *, mesh: Mesh = Mesh(), backend: Backend = "auto"):
        super().__init__()
        check_backend(backend)
        self.mesh, self.backend = mesh, backend
        local = padded_vocab(num_embeddings, mesh.tp.size) // mesh.tp.size
        self.weight = nn.Parameter(torch.empty(local, embedding_dim))
        self.placements = {"weight": split((num_embeddings, embedding_dim), 0, mesh.tp, local)}
        draw_uniform(self, self.placements, 1 / math.sqrt(embedding_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, d), or (b, s/tp, d) under sequence parallelism -> (b, s, padded_vocab/tp)."""
        return column_linear(x, self.weight, self.mesh, backend=self.backend)


class _VocabParallelLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, mesh: Mesh) -> Tensor:
        local = tokens - mesh.tp.rank * weight.shape[0]
        foreign = (local < 0) | (local >= weight.shape[0]) if mesh.tp.size > 1 else None
        if foreign is not None:
            local = local.masked_fill(foreign, 0)
        ctx.mesh, ctx.rows, ctx.foreign = mesh, weight.shape[0], foreign
        ctx.save_for_backward(local)
        x = torch.nn.functional.embedding(local, weight)  # (b, s, d)
        if foreign is None:
            return x
        x.masked_fill_(foreign.unsqueeze(-1), 0.0)
        return start_scatter_sequence(x, mesh.tp).wait() if mesh.sequence_parallel else all_reduce_(x, mesh.tp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (local,) = ctx.saved_tensors
        if ctx.foreign is not None and ctx.mesh.sequence_parallel:
            grad = start_gather_sequence(grad, ctx.mesh.tp).wait()
        if ctx.foreign is not None:
            grad = grad.masked_fill(ctx.foreign.unsqueeze(-1), 0.0)
        dweight = grad.new_zeros(ctx.rows, grad.shape[-1])
        dweight.index_add_(0, local.flatten(), grad.reshape(-1, grad.shape[-1]))
        return None, dweight, None


class PositionEmbedding(nn.Module):
    """Add a learned vector for each position: x[B, S, D] + W[S, D]; the table is a copy on every rank.

    Raises ValueError for a sequence longer than the table.
    """

    def __init__(self, max_seq_len: int, embedding_dim: int, *, mesh: Mesh = Mesh()):
        super().__init__()
        self.mesh = mesh
        self.weight = nn.Parameter(torch.empty(max_seq_len, embedding_dim))
        # under sequence parallelism each rank uses the rows of its own positions only
        self.placements = {"weight": replicated((max_seq_len, embedding_dim), mesh.tp, mesh.sequence_parallel)}
        if not self.weight.is_meta:
            draw_normal(self.weight, self.placements["weight"], fresh_key(), 1.0)

    def forward(self, x: Tensor, positions: slice | Tensor | None = None) -> Tensor:
        """(b, s, d) -> (b, s, d), or (b, s/tp, d) both under sequence parallelism.

        positions: a slice of s, or int64 (b, s), where they are not 0 to s - 1; not under sequence parallelism.
        """
        if positions is not None:
            return x + self.weight[positions]
        first = self.mesh.tp.rank * x.shape[1] if self.mesh.sequence_parallel else 0
        if first + x.shape[1] > self.weight.shape[0]:
            raise ValueError(f"position {first + x.shape[1] - 1} must be below max_seq_len ({self.weight.shape[0]})")
        return x + self.weight[first : first + x.shape[1]]
