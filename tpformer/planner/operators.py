"""What `tpformer calibrate` runs on each core, and the figures that its seconds give, in the time model's own terms."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tpformer.models.llama import Llama, LlamaConfig
from tpformer.parallel_config import ParallelConfig
from tpformer.planner.candidate import Candidate
from tpformer.planner.work import Work, block_work, last_work, sizes, vocabulary
from tpformer_kernels import AttentionOptions, attention, matmul

Call = Callable[[], object]
TOKENS = 256
HIDDEN = (256, 512, 1024)
"""Widths of the products that are timed."""
BLOCKS = (256, 512)
"""Widths of the blocks that are timed."""
SAMPLES = 4
"""Of TOKENS each, for blocks and head: as many as a step's, so that they do not stay in the caches."""
HEAD = (512, 8192)
"""Width and vocabulary of the head that is timed."""
HEADS, LENGTH, HEAD_DIM = 8, 512, 64


@dataclass(frozen=True)
class Measurement:
    """Something to time: prepare() makes its tensors and gives the call."""

    name: str
    prepare: Callable[[], Call]


def measurements() -> list[Measurement]:
    """All that is timed without communication."""
    return [
        Measurement("matmul fp32", partial(_products, torch.float32)),
        Measurement("matmul bf16", partial(_products, torch.bfloat16)),
        Measurement("attention", _attention),
        Measurement("tiny block", partial(_block, tiny(), 1)),
        *(Measurement(f"block {hidden}", partial(_block, model(hidden), SAMPLES)) for hidden in BLOCKS),
        Measurement("head", partial(_head, model(*HEAD))),
    ]


def model(hidden: int, vocabulary_size: int = 128) -> LlamaConfig:
    """A Llama of one block."""
    heads, ffn = hidden // HEAD_DIM, hidden * 11 // 4
    return LlamaConfig(vocabulary_size, hidden, 1, heads, ffn_hidden_size=ffn, max_seq_len=TOKENS)


def tiny() -> LlamaConfig:
    """A Llama whose block takes only what no size changes."""
    return LlamaConfig(128, 64, 1, 1, ffn_hidden_size=64, max_seq_len=8)


def shapes() -> list[tuple[int, int]]:
    """Inputs and outputs of the products."""
    return [(a, b) for hidden in HIDDEN for a, b in ((hidden, hidden), (hidden, hidden * 11 // 4))]


def _products(dtype: torch.dtype) -> Call:
    """Forward, dgrad and weight gradient of linear layers, by the layers' own function."""
    tensors = [
        (torch.randn(TOKENS, a).to(dtype), torch.randn(b, a).to(dtype), torch.randn(TOKENS, b).to(dtype))
        for a, b in shapes()
    ]

    def call() -> None:
        for x, weight, dy in tensors:
            matmul(x, weight.t())
            matmul(dy, weight)
            matmul(dy.t(), x)

    return call


def _attention() -> Call:
    q, k, v = (torch.randn(1, HEADS, LENGTH, HEAD_DIM, requires_grad=True) for _ in range(3))
    gradient, options = torch.randn(1, HEADS, LENGTH, HEAD_DIM), AttentionOptions(causal=True)
    return lambda: torch.autograd.grad(attention(q, k, v, options), (q, k, v), gradient)


def _block(config: LlamaConfig, samples: int) -> Call:
    built = Llama(config)
    x = torch.randn(samples, config.max_seq_len, config.hidden_size, requires_grad=True)
    gradient = torch.randn_like(x)
    return lambda: _forget(built.run_blocks(x).backward(gradient), built, x)


def _head(config: LlamaConfig) -> Call:
    built = Llama(config)
    x = torch.randn(SAMPLES, TOKENS, config.hidden_size, requires_grad=True)
    targets = torch.randint(config.vocab_size, (SAMPLES, TOKENS))
    return lambda: _forget(built.head_loss(built.norm(x), targets).backward(), built, x)


def _forget(_: None, built: Llama, x: Tensor) -> None:
    """As a training step does: the next backward writes new gradients, and adds to none."""
    built.zero_grad(set_to_none=True)
    x.grad = None


@dataclass(frozen=True)
class Rates:
    """What the measured seconds say of a core, while all cores work."""

    flops: dict[str, float]
    attention_efficiency: float
    bandwidth: float
    overhead: float

    @staticmethod
    def of(seconds: dict[str, Any]) -> "Rates":
        """seconds: of one call, by the measurements' names.

        Bandwidth is what makes the time model's sum right for the blocks and the head together: their bytes, over
        what matmuls, attention and overhead leave of their seconds.
        """
        products = sum(6 * TOKENS * a * b for a, b in shapes())
        flops = {kind: products / seconds[f"matmul {kind}"] for kind in ("fp32", "bf16")}
        square = (
            2.0 * LENGTH * LENGTH * HEADS * HEAD_DIM
        )  # of both products, the causal half; backward has five of four
        share = min(1.0, 3.5 * square / seconds["attention"] / flops["fp32"])
        overhead, left, moved = seconds["tiny block"], 0.0, 0.0
        for hidden in BLOCKS:
            work = block_total(model(hidden))
            left += seconds[f"block {hidden}"] - overhead - work.matmul / flops["fp32"]
            left -= work.attention / flops["fp32"] / share
            moved += work.bytes
        work = head_total(model(*HEAD))
        left += seconds["head"] - work.matmul / flops["fp32"]
        moved += work.bytes
        all_seconds = seconds["head"] + sum(seconds[f"block {hidden}"] for hidden in BLOCKS)
        return Rates(flops, share, moved / max(left, 0.01 * all_seconds), overhead)


def _candidate(config: LlamaConfig) -> Candidate:
    return Candidate(config, ParallelConfig(dp=1), config.max_seq_len, SAMPLES, SAMPLES, on_cpu=True)


def block_total(config: LlamaConfig) -> Work:
    """Forward and backward of its block, as the planner counts them."""
    candidate = _candidate(config)
    forward, backward = block_work(sizes(candidate), candidate.seq_len, candidate.width)
    return forward + backward


def head_total(config: LlamaConfig) -> Work:
    """Forward and backward of its norm and head, as the planner counts them."""
    candidate = _candidate(config)
    forward, backward = last_work(sizes(candidate), vocabulary(candidate), candidate.width)
    return forward + backward
