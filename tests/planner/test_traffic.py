"""Predicted traffic is the trace's, exactly: of every row of the composition table, on every rank, and of more."""

import inspect
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.distributed import Ranks
from tests.planner.steps import Case, Kind, counted, traced
from tests.proofs.cases import gpt, llama
from tests.proofs.compositions import MODELS
from tests.proofs.test_compositions import ROWS
from tpformer import LlamaConfig, ParallelConfig
from tpformer.parallel.data import GradientBuckets
from tpformer.planner import dp_traffic, pp_traffic, tp_traffic
from tpformer.planner import traffic as whole
from tpformer.planner.candidate import Candidate
from tpformer.planner.traffic import Traffic, axis_size, traffic

SP: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
UNEVEN = MODELS["llama-uneven"]


def case(model: Any, micro_batch_size: int = 2, bucket_bytes: int = 0, chunk_bytes: int = 0, **options: Any) -> Case:
    return Case(model, ParallelConfig(**options), micro_batch_size, bucket_bytes, chunk_bytes)


MORE = {
    "one key and value head on four ranks": case(llama(num_kv_heads=1, qkv_bias=True, out_bias=True), tp=4),
    "two on four": case(llama(num_kv_heads=2, qkv_bias=True), 8, tp=4, sequence_parallel=True),
    "query and key norms": case(llama(qk_norm=True, head_dim=12), tp=2),
    "and sequence parallelism": case(llama(qk_norm=True, head_dim=12, vocab_size=257), **SP),
    "learned positions": case(gpt(vocab_size=257, max_seq_len=12), **SP),
    "bf16": case(llama(num_kv_heads=2), **SP, precision="bf16"),
    "bf16, wide residual": case(gpt(), **SP, precision="bf16", fp32_residual=True),
    "bf16, all-reduced": case(llama(), tp=2, precision="bf16", fp32_residual=True),
    "bf16 replicas": case(gpt(), dp=2, precision="bf16"),
    "bf16 fsdp": case(UNEVEN, 1, dp=4, dp_mode="fsdp", precision="bf16"),
    "uneven rows": case(UNEVEN, 1, tp=2, dp=2, dp_mode="fsdp"),
    "uneven rows, scattered": case(UNEVEN, 1, **SP, dp=2, dp_mode="zero2", precision="bf16"),
    "uneven groups": case(UNEVEN, 1, dp=4, dp_mode="hsdp", dp_shard=2),
    "a group of all": case(UNEVEN, 1, dp=2, dp_mode="hsdp", dp_shard=2),
    "groups of one": case(UNEVEN, 1, dp=2, dp_mode="hsdp", dp_shard=1),
    "tied and shared out in a pipeline": case(gpt(num_layers=3), 1, pp=2, dp=2, dp_mode="fsdp", precision="bf16"),
    "buckets": case(llama(num_layers=4), dp=2, bucket_bytes=20000),
    "buckets of a pipeline": case(gpt(num_layers=4), 1, pp=2, dp=2, bucket_bytes=30000, pp_schedule="interleaved_1f1b"),
    "buckets without a bubble": case(gpt(num_layers=4), 1, pp=2, dp=2, bucket_bytes=30000, pp_schedule="dualpipev"),
    "chunks of the loss": case(llama(tie_embeddings=True), 8, tp=2, chunk_bytes=40 * 64 * 4),
    "chunks, scattered": case(gpt(), 8, **SP, chunk_bytes=1),
    "three stages a rank": case(llama(num_layers=6), pp=2, pp_schedule="interleaved_1f1b", stages_per_rank=3),
    "a turn that is no hand-over": case(llama(num_layers=8), 1, pp=4, pp_schedule="zbv"),
    "four stages a rank, shared out": case(
        llama(num_layers=9),
        pp=2,
        dp=2,
        dp_mode="zero2",
        pp_schedule="interleaved_1f1b",
        stages_per_rank=4,
        layers_per_stage=(1, 1, 2, 1, 1, 1, 1, 1),
    ),
    "fsdp where it turns": case(llama(num_layers=4), 1, pp=2, dp=2, dp_mode="fsdp", pp_schedule="zbv"),
    "recomputed": case(llama(num_layers=3), **SP, recompute="full", recompute_every=2),
    "recomputed mlp": case(gpt(), **SP, recompute="selective", recompute_modules=("mlp", "attention.core")),
    "recomputed projections": case(
        llama(), **SP, recompute="selective", recompute_modules=("mlp.gate_up", "attention.out", "attention_norm")
    ),
    "recomputed, one inside another": case(
        llama(), **SP, recompute="selective", recompute_modules=("attention", "attention.qkv")
    ),
    "recomputed, chunked": case(llama(), **SP, recompute="full", overlap="chunked"),
    "recomputed, compiled, scattered": case(gpt(), **SP, recompute="full", compile=True),
    "fp16": case(gpt(), **SP, pp=2, precision="fp16", fp32_residual=True),
}
ALL = {str(row): Case.of(row) for row in ROWS} | MORE


Traced = list[tuple[int, int, Counter[Kind]]]
"""Of each rank its place on pp and dp, and what it sent."""


@pytest.fixture(scope="module")
def run(ranks: Ranks) -> Callable[[str], Traced]:
    """The trace of a case, each run once."""
    found: dict[str, Traced] = {}

    def traces(name: str) -> Traced:
        if name not in found:
            found[name] = ranks(traced, ALL[name].candidate.world_size, ALL[name])
        return found[name]

    return traces


def wrong(name: str, traces: Traced) -> list[int]:
    """The ranks of which something else was predicted."""
    case = ALL[name]
    with case.small():
        predicted = [counted(traffic(case.candidate, pp_rank, dp_rank=dp_rank)) for pp_rank, dp_rank, _ in traces]
    return [rank for rank, (_, _, found) in enumerate(traces) if predicted[rank] != found]


@pytest.mark.parametrize("name", ALL)
def test_every_rank_sends_what_was_predicted(name: str, run: Callable[[str], Traced]) -> None:
    assert wrong(name, run(name)) == []


BROKEN: dict[str, tuple[str, Any, str, Any]] = {
    "a block's last sum is replayed": ("recomputed", tp_traffic, "replays", lambda *_: (2, 2)),
    "nothing is replayed": ("recomputed mlp", tp_traffic, "replays", lambda *_: (0, 0)),
    "one statistic more": ("chunks of the loss", tp_traffic, "STATISTICS", 4),
    "no partial sums": ("query and key norms", tp_traffic, "_partial_sum", lambda *_: []),
    "copied rows of another replica": ("uneven rows", tp_traffic, "_present", lambda c, *_: c.rows * c.width),
    "other buckets": ("buckets", dp_traffic, "bucket_sizes", lambda *_: (22336, 22336)),
    "backward sends them all": ("buckets without a bubble", dp_traffic, "_by_hooks", lambda *_: None),
    "backward sends none": ("buckets without a bubble", dp_traffic, "_by_hooks", lambda *_: 0),
    "rows without padding": ("bf16 fsdp", dp_traffic, "padded", lambda shapes, _: dp_traffic.count(shapes)),
    "all stages stay gathered": ("four stages a rank, shared out", dp_traffic, "STAGES_GATHERED", 4),
    "blocks stay gathered": ("uneven groups", dp_traffic, "kept", lambda _: True),
    "tied ends apart": ("tied and shared out in a pipeline", pp_traffic, "_tied", lambda *_: []),
    "the turn sends": (
        "a turn that is no hand-over",
        whole,
        "share_of",
        lambda c, r, of=whole.share_of: replace(of(c, r), before=2, after=2),
    ),
    "no stop in the norm": ("fp16", whole, "NORM_SUMS", 2),
    "another name of the world": ("query and key norms", whole, "_world", lambda _: "world"),
}


@pytest.mark.parametrize("control", BROKEN)
def test_a_broken_term_is_seen(control: str, run: Callable[[str], Traced], monkeypatch: pytest.MonkeyPatch) -> None:
    name, module, attribute, instead = BROKEN[control]
    assert wrong(name, run(name)) == []
    cached = (tp_traffic._partial_numbers, dp_traffic._rotated, dp_traffic._kinds)
    for function in cached:
        function.cache_clear()
    monkeypatch.setattr(module, attribute, instead)
    try:
        assert wrong(name, run(name)) != []
    finally:
        for function in cached:
            function.cache_clear()


def test_buckets_are_as_large_as_those_of_training() -> None:
    assert inspect.signature(GradientBuckets).parameters["bucket_bytes"].default == dp_traffic.BUCKET_BYTES


def test_an_example_by_hand() -> None:
    """Llama 7B, tp 8, 2 micro-batches of (1, 2048): what the formulas say, and what a ring sends of it."""
    model = LlamaConfig(num_layers=32)
    found = traffic(Candidate(model, ParallelConfig(tp=8, dp=1, precision="bf16"), 2048, 2, 1))
    (blocks,) = [each for each in found if each.what == "sum of a block's two regions"]
    assert blocks.factors == (("b", 1), ("s", 2048), ("d", 4096), ("bytes", 2))
    assert blocks.call_factors == (("micro-batches", 2), ("blocks", 32), ("regions", 2))
    assert (blocks.bytes, blocks.calls, blocks.total) == (16 * 2**20, 128, 2**31)
    assert blocks.sent(8) == 2**31 * 2 * 7 // 8
    assert not blocks.hidden
    (gradient,) = [each for each in found if each.what == "gradient of two regions' input"]
    assert gradient.hidden
    assert replace(blocks, op="all_gather").sent(8) == 2**31 * 7 // 8
    assert replace(blocks, op="send").sent(8) == blocks.total
    assert replace(blocks, op="recv").sent(8) == 0


def test_what_overlaps_is_hidden() -> None:
    """On GPUs the doors of sequence parallelism, unless it is off; on CPUs if chunks are asked for."""
    for overlap, on_cpu, expected in (("auto", False, True), ("off", False, False), ("auto", True, False)):
        layout = ParallelConfig(tp=2, dp=1, sequence_parallel=True, overlap=overlap)  # type: ignore[arg-type]
        found = traffic(Candidate(llama(), layout, 8, 8, 2, on_cpu=on_cpu))
        doors = [each.hidden for each in found if each.what.endswith("a block's two regions")]
        assert doors == [expected] * 2


def test_what_no_rank_is_raises() -> None:
    candidate = Candidate(llama(), ParallelConfig(pp=2, dp=2), 8, 8, 2)
    with pytest.raises(ValueError, match=r"pp_rank \(2\) must be in 0..1"):
        traffic(candidate, 2)
    with pytest.raises(ValueError, match=r"dp_rank \(2\) must be in 0..1"):
        traffic(candidate, dp_rank=2)


def test_axes_have_their_sizes() -> None:
    candidate = Candidate(llama(), ParallelConfig(tp=2, pp=2, dp=4, dp_mode="hsdp", dp_shard=2), 8, 8, 1)
    sizes = {"tp": 2, "pp": 2, "dp": 4, "dp_shard": 2, "dp_replicate": 2, "world": 16}
    assert {axis: axis_size(candidate, axis) for axis in sizes} == sizes


def test_a_search_can_afford_it() -> None:
    """Also of a thousand blocks on 64 stages, each candidate new: no call after the first loops over them."""
    model = LlamaConfig(num_layers=1000)
    layouts = [
        ParallelConfig(tp=8, pp=64, dp=4, sequence_parallel=True, dp_mode=mode, recompute=recompute, precision="bf16")
        for mode in ("replicate", "zero2", "fsdp")
        for recompute in ("none", "full")
    ]
    candidates = [Candidate(model, p, 4096, 4 * 64 * m, m) for p in layouts for m in range(1, 50)]
    traffic(candidates[0], 63)
    took = []
    for candidate in candidates:
        start = time.perf_counter()
        found: tuple[Traffic, ...] = traffic(candidate, 63)
        took.append(time.perf_counter() - start)
    assert len(found) > 10
    assert sorted(took)[len(took) // 2] < 5e-4  # 0.06 ms, on a machine with nothing else to do
