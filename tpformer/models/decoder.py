"""What the decoder families share; each takes these functions as its methods, there is no base class."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tpformer.collectives import gather_features
from tpformer.layers.cache import KVCache
from tpformer.layers.cross_entropy import LossOptions
from tpformer.layers.embedding import VocabParallelEmbedding
from tpformer.layers.linear import column_linear
from tpformer.layers.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from tpformer.random import Key


@dataclass(frozen=True)
class Part:
    """What a process builds of a decoder, if not all of it: some blocks, by number, and maybe its two ends.

    first: the embedding. last: the final norm and the head, for tied weights a second copy of the embedding.
    """

    layers: tuple[int, ...]
    first: bool
    last: bool

    @staticmethod
    def whole(num_layers: int) -> "Part":
        """All of a model."""
        return Part(tuple(range(num_layers)), True, True)


def tie_to_first(part: Part, embedding: VocabParallelEmbedding) -> VocabParallelEmbedding:
    """The embedding, which a tied head reads too: on another process than the first one it is a replica."""
    if not part.first:
        weight = embedding.placements["weight"]
        embedding.placements["weight"] = replace(weight, replica=1)
    return embedding


def run_blocks(
    self: Any,
    x: Tensor,
    layers: Iterable[int] | None = None,
    *,
    key: Key | None = None,
    cache: KVCache | None = None,
) -> Tensor:
    """x (b, s, d), or (b, s/tp, d) under sequence parallelism, through the blocks of these numbers; by default all."""
    rope = self.rope(x, cache)
    for name in self.blocks if layers is None else map(str, layers):
        cached = () if cache is None else (cache.block(name),)
        x = self.blocks[name](x, rope, key and key.fold("block", name), *cached)
    return x


def check_length(tokens: Tensor, max_seq_len: int) -> None:
    """Raises ValueError unless tokens are (b, s) with s within max_seq_len."""
    if tokens.dim() != 2 or tokens.shape[1] > max_seq_len:
        shape = tuple(tokens.shape)
        raise ValueError(f"tokens {shape} must be (batch, length) with length <= max_seq_len ({max_seq_len})")


def embed_tokens(self: Any, tokens: Tensor) -> Tensor:
    """int64 (b, s) -> the residual stream's beginning, (b, s, d), or (b, s/tp, d) under sequence parallelism."""
    x = self.embedding(tokens)
    # nothing else needs to know: blocks keep the dtype of their stream
    return x.to(torch.promote_types(x.dtype, torch.float32)) if self.fp32_residual else x


def to_logits(self: Any, x: Tensor) -> Tensor:
    """(b, s, d), or (b, s/tp, d) under sequence parallelism -> this rank's logits (b, s, padded_vocab/tp)."""
    if self.head is None:  # tied: the embedding's own rows
        return column_linear(x, self.embedding.weight, self.embedding.mesh, backend=self.config.backend)
    return self.head(x)


def full_logits(self: Any, tokens: Tensor) -> Tensor:
    """int64 (b, s) -> the whole logits (b, s, vocab_size) on every rank; collective."""
    return gather_features(self(tokens), self.mesh.tp)[..., : self.config.vocab_size]


def next_logits(self: Any, tokens: Tensor, cache: KVCache) -> Tensor:
    """int64 (b, s), which the cache was advanced by -> the logits after the last, (b, vocab_size), on every rank.

    Collective. Not under sequence parallelism, which `generate` leaves.
    """
    return self.last_logits(self.run_blocks(self.embed(tokens, cache=cache), cache=cache))


def last_logits(self: Any, x: Tensor) -> Tensor:
    """What the last block gives, (b, s, d) -> the logits after the last position, (b, vocab_size), on every rank."""
    logits = gather_features(self.to_logits(self.norm(x[:, -1:])), self.mesh.tp)
    return logits[:, 0, : self.config.vocab_size]


def hidden_states(self: Any, tokens: Tensor, *, key: Key | None = None) -> Tensor:
    """int64 (b, s) -> what the head multiplies, (b, s, d) or, under sequence parallelism, (b, s/tp, d)."""
    return self.norm(self.run_blocks(self.embed(tokens, key), key=key))


def loss(self: Any, tokens: Tensor, targets: Tensor, *, key: Key | None = None, z_loss: float = 0.0) -> Tensor:
    """Mean cross entropy in nats per token, targets (b, s) with -100 ignored; whole logits never exist."""
    return self.head_loss(self.hidden_states(tokens, key=key), targets, z_loss)


def head_loss(self: Any, x: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """What the final norm gives, (b, s, d) or (b, s/tp, d), and targets (b, s) -> mean loss in nats per token."""
    weight = self.embedding.weight if self.head is None else self.head.weight
    options: LossOptions = {"vocab_size": self.config.vocab_size, "backend": self.config.backend, "z_loss": z_loss}
    return vocab_parallel_linear_cross_entropy(x, weight, targets, self.mesh, **options)
