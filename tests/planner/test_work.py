"""FLOPs of a rank's work, against those that torch counts in a plain model, and divided as tp divides them."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers.plain import PlainLlama, PlainLlamaConfig
from tpformer import LlamaConfig, ParallelConfig
from tpformer.planner.candidate import Candidate
from tpformer.planner.work import Work, block_work, last_work, sizes, vocabulary

SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 160,
    "max_seq_len": 32,
}
MODEL = LlamaConfig(**SHAPE)


def candidate(**options: Any) -> Candidate:
    return Candidate(MODEL, ParallelConfig(**({"dp": 1} | options)), 32, 4, 2)


def of_all(c: Candidate) -> tuple[float, float]:
    """FLOPs of products with weights, and of attention, of one micro-batch on one rank."""
    s = sizes(c)
    forward, backward = block_work(s, c.seq_len, c.width)
    ends = [sum(work.matmul for work in last_work(s, vocabulary(c), c.width))]
    return MODEL.num_layers * (forward.matmul + backward.matmul) + sum(ends), forward.attention + backward.attention


def test_torch_counts_as_many_in_a_plain_model() -> None:
    """Forward and backward, with attention as products of whole squares."""
    model = PlainLlama(PlainLlamaConfig(**SHAPE))
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(tokens, tokens).backward()
    whole = [work.attention for work in block_work(sizes(candidate()), 32, 4, fused_attention=False)]
    assert of_all(candidate())[0] + MODEL.num_layers * sum(whole) == counter.get_total_flops()


@pytest.mark.parametrize("tp", [2, 4])
def test_tp_divides_the_work(tp: int) -> None:
    """Exactly where it divides the key-value heads; where ranks share one, its projection is computed by each."""
    alone, split = of_all(candidate()), of_all(candidate(tp=tp))
    extra = 0.0
    if tp == 4:  # two ranks share a key-value head: its keys and values, forward and twice backward, each time again
        extra = MODEL.num_layers * 6.0 * 64 * 64 * 2 * 16 / 2
    assert split[0] == pytest.approx(alone[0] / tp + extra, rel=1e-12)
    assert split[1] == pytest.approx(alone[1] / tp)


def test_the_usual_count_of_a_model_is_the_same_work() -> None:
    """flops_per_token has all of it, and the whole square."""
    c = candidate()
    matmul, attention = of_all(c)
    forward = block_work(sizes(c), 32, 4)[0].attention
    assert MODEL.flops_per_token(32) * 64 == matmul + MODEL.num_layers * 3 * 2 * forward
    assert attention == 3.5 * forward


def test_work_adds_and_multiplies() -> None:
    assert (Work(1, 2, 3) + Work(1, 1, 1)).times(2) == Work(4, 6, 8)
