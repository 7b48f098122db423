"""A projected rank does the true share of the work: the collectives of a real run, and no FLOP too few or too many."""

from dataclasses import asdict, replace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers.plain import PlainLlamaConfig
from benchmarks.scaling_jobs import Job
from benchmarks.scaling_presets import PRESETS
from benchmarks.scaling_projection import communication, network_line, project
from benchmarks.scaling_steps import build_job
from benchmarks.scaling_worker import trace
from tests.distributed import Ranks
from tpformer.planner.machine import Link

MODEL = cast(PlainLlamaConfig, PRESETS["cpu-tiny"].model)
LINK = Link("wire", bandwidth=1e9, latency=1e-6, source="invented", efficiency=0.5)


def seen(job: Job) -> list[dict[str, Any]]:
    """On a rank: a step's communication."""
    if job.projected:
        dist.destroy_process_group()
    return trace(job, build_job(job, "cpu"))["communication"]


@pytest.mark.parametrize(
    ("kind", "axis", "degree"),
    [("tpformer", "tp", 2), ("tpformer", "tp", 4), ("tpformer", "dp", 2), ("dtensor", "tp", 2)],
)
def test_a_projected_rank_communicates_as_a_real_one(kind: str, axis: Any, degree: int, ranks: Ranks) -> None:
    job = Job(kind, axis, degree, MODEL, 4, 4 // degree if axis == "dp" else 4)
    real = ranks(seen, degree, job)
    (projected,) = ranks(seen, 1, replace(job, projected=True))
    assert len(projected) > 0
    assert projected == real[0]


def test_another_degree_communicates_otherwise(ranks: Ranks) -> None:
    """Negative control: the comparison above would see a share of the wrong degree."""
    two, four = (Job("tpformer", "tp", degree, MODEL, 4, 4, projected=True) for degree in (2, 4))
    assert ranks(seen, 1, two) != ranks(seen, 1, four)


def attention(query: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    """FLOPs of the two products of an attention's forward, the whole square."""
    batch, heads, length, width = query
    return 4 * batch * heads * length**2 * width


def flops(job: Job) -> int:
    """On a rank: what a step's matmuls take, and its attention's forward."""
    if job.projected:
        dist.destroy_process_group()
    built = build_job(job, "cpu")
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={on_cpu: attention}) as counter:
        built.step()
    assert "_flash_attention_for_cpu" in str(counter.get_flop_counts()["Global"])
    return counter.get_total_flops()


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_projected_rank_does_its_share_of_the_flops(tp: int, ranks: Ranks) -> None:
    """Nothing of this model is done twice at tp 2; at tp 4 the two KV heads are, and that is all."""
    job = Job("tpformer", "tp", tp, MODEL, 4, 4, projected=tp > 1)
    (counted,) = ranks(flops, 1, job)
    attended = 4 * job.batch * MODEL.max_seq_len**2 * MODEL.hidden_size * MODEL.num_layers
    once = job.flops - 2 * attended  # its backward is not counted
    kv_head = MODEL.hidden_size // MODEL.num_heads * MODEL.hidden_size
    copies = 2 * max(0, tp - MODEL.num_kv_heads) * kv_head * MODEL.num_layers
    assert tp * counted == once + 6 * job.tokens * copies


def row() -> dict[str, Any]:
    calls = [
        {"op": "all_reduce", "axis": "tp", "dtype": "float32", "bytes_each": 1_000_000, "calls": 3},
        {"op": "all_gather", "axis": "tp", "dtype": "float32", "bytes_each": 4_000, "calls": 1},
    ]
    return {"degree": 4, "median_ms": 100.0, "p20_ms": 90.0, "p80_ms": 120.0, "communication": [calls]}


def test_the_links_time_is_added_by_hand() -> None:
    all_reduce = 2 * 3 / 4 * 1_000_000 / 0.5e9 + 6 * 1e-6
    all_gather = 3 / 4 * 4_000 / 0.5e9 + 3 * 1e-6
    expected = 3 * all_reduce + all_gather
    assert communication(row()["communication"][0], 4, LINK) == pytest.approx({"tp": expected})
    found = project(row(), LINK)
    for name in ("median_ms", "p20_ms", "p80_ms"):
        assert found[name] == pytest.approx(row()[name] + 1e3 * expected)
    assert found["exposed"]["axes"]["tp"]["seconds"] == pytest.approx(expected)
    assert found["projection"]["local_ms"] == 100.0


def test_what_is_no_ring_cannot_be_projected() -> None:
    strange = row()
    strange["communication"][0][0]["op"] = "broadcast"
    with pytest.raises(ValueError, match="broadcast"):
        project(strange, LINK)


def test_the_networks_figures_and_source_are_told() -> None:
    line = network_line(asdict(LINK))
    assert line.startswith("PROJECTED with wire: 1 GB/s each way x 0.5, 1 µs a hop") and "(invented)" in line
