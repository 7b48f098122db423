"""How the next token is chosen from its logits: the same on every rank, and at any tp."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tpformer.random import Key, uniform
from tpformer_kernels import random_columns


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen, and when a row has ended. Raises ValueError for options out of range.

    In this order: the repetition penalty, the temperature, top_k, top_p.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token, whatever top_k, top_p and seed."""
    top_k: int | None = None
    """Only this many of the likeliest tokens are left, and those as likely as the last of them."""
    top_p: float | None = None
    """Only the likeliest tokens are left that together have this probability (arXiv 1904.09751)."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the row, its prompt's too, are divided by it if above 0, else multiplied (1909.05858)."""
    seed: int = 0
    """One seed gives the same tokens at any layout, to rounding of the logits."""
    stop_tokens: tuple[int, ...] = ()
    """After one of these a row has ended."""
    pad_token: int | None = None
    """What a row that has ended is filled with; by default the first of stop_tokens."""

    def __post_init__(self) -> None:
        top_k, top_p = self.top_k, self.top_p
        in_range = self.temperature >= 0 and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)
        if not in_range:
            raise ValueError(
                f"temperature ({self.temperature}) >= 0, top_k ({top_k}) >= 1 and 0 < top_p ({top_p}) <= 1 must hold"
            )
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty ({self.repetition_penalty}) must be above 0")

    @property
    def padding(self) -> int:
        """What a row that has ended is filled with."""
        return self.pad_token if self.pad_token is not None else self.stop_tokens[0]


class Sampler:
    """Chooses each row's next token.

    tokens: the prompts, int64 (b, s). attention_mask: bool (b, s), False for padding; None: there is none.
    """

    def __init__(self, options: SamplingOptions, tokens: Tensor, attention_mask: Tensor | None, vocab_size: int):
        self.options, self.steps = options, 0
        self._used: Tensor | None = None  # bool (b, vocab_size)
        if options.repetition_penalty != 1:
            times = torch.ones_like(tokens) if attention_mask is None else attention_mask.long()
            counts = times.new_zeros(len(tokens), vocab_size)
            self._used = counts.scatter_add_(1, tokens.masked_fill(times == 0, 0), times) > 0

    def choose(self, logits: Tensor) -> Tensor:
        """(b, vocab_size) -> int64 (b)."""
        o = self.options
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._used is not None:
            logits = penalise(logits, self._used, o.repetition_penalty)
        if o.temperature == 0:
            chosen = logits.argmax(dim=-1)
        else:
            key = Key(o.seed).fold("generate", self.steps)
            chosen = draw(keep_likeliest(logits / o.temperature, o.top_k, o.top_p), key)
        self.steps += 1
        if self._used is not None:
            self._used.scatter_(1, chosen.unsqueeze(1), True)
        return chosen


def penalise(logits: Tensor, used: Tensor, penalty: float) -> Tensor:
    """Make tokens of a row that are in it less likely (a penalty below 1: more); used: bool (b, vocab_size)."""
    return torch.where(used, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_likeliest(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set all but the likeliest logits to -inf."""
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:  # of 1 rounding would leave some out
        probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p  # the first token always stays
        logits = logits.masked_fill(beyond.gather(1, order.argsort(dim=-1)), -torch.inf)
    return logits


def draw(logits: Tensor, key: Key) -> Tensor:
    """One token a row, (b), by the Gumbel-max trick over global token ids."""
    rows = torch.arange(logits.shape[0], device=logits.device)
    words = random_columns(key.seed, (rows, torch.zeros_like(rows), torch.zeros_like(rows)), 0, logits.shape[1])
    gumbel = -(-uniform(words).log()).log()
    return (logits + gumbel).argmax(dim=-1)
