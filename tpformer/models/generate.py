"""Sampling from a decoder at any tp; every rank draws the same tokens."""

from typing import Protocol

import torch
from torch import Tensor

from tpformer.mesh import Mesh, divide
from tpformer.random import Key, uniform
from tpformer_kernels import random_columns


class Decoder(Protocol):
    """What sampling needs of a model."""

    mesh: Mesh

    def full_logits(self, tokens: Tensor) -> Tensor:
        """int64 (b, s) -> (b, s, vocab_size) on every rank."""
        ...


@torch.no_grad()
def generate(
    model: Decoder,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Append max_new_tokens sampled tokens: int64 (b, s) -> (b, s + max_new_tokens), the same on every rank.

    temperature 0 takes the likeliest token; top_k and top_p (arXiv 1904.09751) leave only the likeliest ones.
    The model sees at most its last max_seq_len tokens. One seed gives the same tokens at any tp, to rounding
    of the logits. Raises ValueError for options out of range, and under sequence parallelism for a max_seq_len that
    tp does not divide.
    """
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(
            f"temperature ({temperature}) >= 0, top_k ({top_k}) >= 1 and 0 < top_p ({top_p}) <= 1 must hold"
        )
    window = model.config.max_seq_len  # type: ignore[attr-defined]
    if model.mesh.sequence_parallel:
        divide(window, model.mesh.tp.size, "max_seq_len")
    for step in range(max_new_tokens):
        logits = _next_logits(model, tokens[:, -window:])  # (b, vocab)
        if temperature == 0:
            chosen = logits.argmax(dim=-1)
        else:
            chosen = _sample(_filter(logits / temperature, top_k, top_p), Key(seed).fold("generate", step))
        tokens = torch.cat([tokens, chosen.unsqueeze(1)], dim=1)
    return tokens


def _next_logits(model: Decoder, tokens: Tensor) -> Tensor:
    """The logits after the last token, (b, vocab), in fp32 or fp64."""
    length = tokens.shape[1]
    if model.mesh.sequence_parallel:  # a causal model does not see what is appended to make the length whole
        tokens = torch.nn.functional.pad(tokens, (0, -length % model.mesh.tp.size))
    logits = model.full_logits(tokens)[:, length - 1]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _filter(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set all but the likeliest logits to -inf."""
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p  # the first token always stays
        logits = logits.masked_fill(beyond.gather(1, order.argsort(dim=-1)), -torch.inf)
    return logits


def _sample(logits: Tensor, key: Key) -> Tensor:
    """One token a row, (b), by the Gumbel-max trick over global token ids."""
    rows = torch.arange(logits.shape[0], device=logits.device)
    words = random_columns(key.seed, (rows, torch.zeros_like(rows), torch.zeros_like(rows)), 0, logits.shape[1])
    gumbel = -(-uniform(words).log()).log()
    return (logits + gumbel).argmax(dim=-1)
