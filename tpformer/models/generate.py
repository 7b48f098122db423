"""Generation from a decoder at any layout: every rank draws the same tokens."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tpformer.layers.cache import KVCache
from tpformer.mesh import Mesh
from tpformer.models.sampling import Sampler, SamplingOptions


class Decoder(Protocol):
    """What generation needs: a model, a stage that is a whole one, or a pipeline has it."""

    config: Any
    mesh: Mesh

    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """int64 (b, s), which the cache was advanced by -> the logits after the last, (b, vocab_size), on any rank."""
        ...

    def modules(self) -> Iterable[nn.Module]:
        """All that computes them here."""
        ...


@torch.no_grad()
def generate(
    model: Decoder,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    stream: Callable[[Tensor], object] | None = None,
    progress: bool = False,
    sampling: SamplingOptions = SamplingOptions(),
    **options: Any,
) -> Tensor:
    """Append up to max_new_tokens tokens to each prompt: int64 (b, s) -> (b, s + new), the same on every rank.

    attention_mask: (b, s), 0 for padding, where prompts differ in length: it stands to the left of them, and a row is
    what it would be alone. stream: called on every rank with each new column, int64 (b). progress: a bar on rank 0.
    options: those of SamplingOptions by name, temperature and top_k for instance, in place of sampling's.
    One seed gives the same tokens at any layout, to rounding of the logits; it ends early when all rows have.
    Keys and values are kept, heads split over tp; collective, with nothing split along the sequence.
    Raises ValueError, on every rank before anything is computed, for options, prompts or a mask that are none, and for
    more than max_seq_len tokens in a row.
    """
    sampling = replace(sampling, **options)
    mask = _checked_mask(tokens, attention_mask)
    _check(model.config, tokens, mask, max_new_tokens, sampling)
    columns = [tokens]
    quiet = not progress or model.mesh.world.rank != 0
    new = _new_columns(model, tokens, mask, max_new_tokens, sampling)
    with _whole_sequences(model):
        for column in tqdm(new, total=max_new_tokens, unit="token", disable=quiet):
            columns.append(column.unsqueeze(1))
            if stream is not None:
                stream(column)
    return torch.cat(columns, dim=1)


def _new_columns(
    model: Decoder, tokens: Tensor, mask: Tensor | None, max_new_tokens: int, sampling: SamplingOptions
) -> Iterator[Tensor]:
    """The next token of each row, int64 (b), and the next, until all rows have ended."""
    cache = KVCache(tokens.shape[1] + max_new_tokens, mask)
    sampler = Sampler(sampling, tokens, mask, model.config.vocab_size)
    ends = torch.tensor(sampling.stop_tokens, dtype=torch.int64, device=tokens.device)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    unseen = tokens if mask is None else tokens.masked_fill(~mask, 0)  # what is masked may be any number
    for _ in range(max_new_tokens):
        cache.advance(unseen.shape[1])
        chosen = sampler.choose(model.next_logits(unseen, cache))
        unseen = chosen.unsqueeze(1)
        if not len(ends):
            yield chosen
            continue
        yield chosen.masked_fill(ended, sampling.padding)
        ended |= torch.isin(chosen, ends)
        if ended.all():
            return


@contextmanager
def _whole_sequences(model: Decoder) -> Iterator[None]:
    """No sequence parallelism inside: a single token cannot be split, and the weights lie the same without."""
    found = [(m, mesh) for m in model.modules() if isinstance(mesh := getattr(m, "mesh", None), Mesh)]
    split = [(module, mesh) for module, mesh in found if mesh.sequence_parallel]
    try:
        for module, mesh in split:
            module.mesh = replace(mesh, sequence_parallel=False)  # type: ignore[assignment]
        yield
    finally:
        for module, mesh in split:
            module.mesh = mesh  # type: ignore[assignment]


def _checked_mask(tokens: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """As bool (b, s), None where no prompt is padded; raises ValueError unless padding is to the left of tokens."""
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 1:
        raise ValueError(f"tokens {tuple(tokens.shape)} must be (batch, length), both at least 1")
    if attention_mask is None:
        return None
    if attention_mask.shape != tokens.shape:
        raise ValueError(f"attention_mask {tuple(attention_mask.shape)} must have the shape {tuple(tokens.shape)}")
    mask = attention_mask.to(tokens.device, torch.bool)
    if not mask[:, -1].all() or (mask[:, :-1] & ~mask[:, 1:]).any():
        row = int((~mask[:, -1] | (mask[:, :-1] & ~mask[:, 1:]).any(1)).nonzero()[0])
        raise ValueError(f"attention_mask row {row} must be zeros, then at least one 1: pad prompts on the left")
    return None if mask.all() else mask


def _check(config: Any, tokens: Tensor, mask: Tensor | None, max_new_tokens: int, sampling: SamplingOptions) -> None:
    """Raises ValueError for numbers that do not fit the model: in a pipeline its other stages would wait for ever."""
    limit, vocab_size, length = config.max_seq_len, config.vocab_size, tokens.shape[1]
    if max_new_tokens < 0 or length + max_new_tokens > limit:
        raise ValueError(
            f"prompt ({length}) + max_new_tokens ({max_new_tokens}) must be at most max_seq_len ({limit}), "
            "and max_new_tokens at least 0"
        )
    wrong = (tokens < 0) | (tokens >= vocab_size)
    wrong = wrong if mask is None else wrong & mask
    stops = [token for token in sampling.stop_tokens if not 0 <= token < vocab_size]
    if wrong.any() or stops:
        token = f"stop token {stops[0]}" if stops else f"token {int(tokens[wrong][0])}"
        raise ValueError(f"{token} must be in 0..{vocab_size - 1} (vocab_size {vocab_size})")
