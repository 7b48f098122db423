"""Predicted traffic is the trace's, exactly: of every row of the composition table, on every rank, and of more."""

from typing import Any

import pytest

from tests.distributed import Ranks
from tests.planner.steps import Case, counted, traced
from tests.proofs.cases import gpt, llama
from tests.proofs.compositions import MODELS
from tests.proofs.test_compositions import ROWS
from tpformer import ParallelConfig
from tpformer.planner.traffic import traffic

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
    "fsdp where it turns": case(llama(num_layers=4), 1, pp=2, dp=2, dp_mode="fsdp", pp_schedule="zbv"),
    "recomputed": case(llama(num_layers=3), **SP, recompute="full", recompute_every=2),
    "recomputed mlp": case(gpt(), **SP, recompute="selective", recompute_modules=("mlp", "attention.core")),
    "recomputed projections": case(
        llama(), **SP, recompute="selective", recompute_modules=("mlp.gate_up", "attention.out", "attention_norm")
    ),
    "recomputed, compiled": case(llama(), tp=2, recompute="full", compile=True),
    "recomputed, compiled, scattered": case(gpt(), **SP, recompute="full", compile=True),
    "fp16": case(gpt(), **SP, pp=2, precision="fp16", fp32_residual=True),
}
ALL = {str(row): Case.of(row) for row in ROWS} | MORE


@pytest.mark.parametrize("name", ALL)
def test_every_rank_sends_what_was_predicted(name: str, ranks: Ranks) -> None:
    case = ALL[name]
    with case.small():
        for pp_rank, dp_rank, found in ranks(traced, case.candidate.world_size, case):
            assert counted(traffic(case.candidate, pp_rank, dp_rank=dp_rank)) == found, (pp_rank, dp_rank)
