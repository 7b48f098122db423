"""What sharing out communicates: each gather and reduction counted, in its dtype, and in which micro-batch."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import Ranks
from tests.proofs.compositions import VOCABULARY, Composition, batch, steps
from tpformer import Mesh, ParallelConfig
from tpformer.parallel import fsdp
from tpformer.trace import trace_communication
from tpformer.train.build import build
from tpformer.train.step import StepOptions, train_step

BLOCKS = 4
UNITS = BLOCKS + 1  # and the two ends, in one
FP32 = torch.float32
Sent = tuple[str, str, str, str]


def run(case: Composition, always: bool = False) -> list[Sent]:
    """On a rank: op, axis, dtype and phase of what a step sends; if always, each micro-batch's gradients too."""
    mesh = Mesh.of(case.parallel, "cpu")
    built = build(case.config(), mesh, VOCABULARY)
    gradients: Any = built.gradients
    if always:
        start = gradients.start
        gradients.start = lambda last: start(last=True)
    samples = batch(0)[mesh.dp.rank * 8 // mesh.dp.size :][: 8 // mesh.dp.size]
    with trace_communication() as trace:
        train_step(
            built.runner,
            gradients,
            built.optimizer,
            samples,
            StepOptions(micro_batch_size=case.micro_batch_size, lr=0.01),
        )
    return [(call.op, call.axis, call.dtype, call.phase) for call in trace.calls]


def layout(micro_batches: int, **options: Any) -> Composition:
    """dp 2, whose replicas have four samples each."""
    return Composition("llama", ParallelConfig(dp=2, **options), 4 // micro_batches, FP32)


GATHERED = ("all_gather", "dp", "float32")
REDUCED = ("reduce_scatter", "dp", "float32")
NORM = ("all_reduce", "dp", "float64", "forward")


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_fsdp_gathers_twice_a_micro_batch_and_reduces_once_a_step(micro_batches: int, ranks: Ranks) -> None:
    """Each block for forward and for backward, the ends once; gradients after the last forward only."""
    first, second = ranks(run, 2, layout(micro_batches, dp_mode="fsdp"))
    assert first == second
    assert Counter(first) == {
        (*GATHERED, "forward"): micro_batches * UNITS,
        (*GATHERED, "backward"): micro_batches * BLOCKS,
        (*REDUCED, "backward"): UNITS,
        NORM: 1,
    }
    last_forward = max(n for n, sent in enumerate(first) if sent == (*GATHERED, "forward"))
    assert first.index((*REDUCED, "backward")) > last_forward


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_zero2_gathers_and_reduces_once_a_step(micro_batches: int, ranks: Ranks) -> None:
    first, second = ranks(run, 2, layout(micro_batches, dp_mode="zero2"))
    assert first == second
    assert Counter(first) == {(*GATHERED, "forward"): UNITS, (*REDUCED, "backward"): UNITS, NORM: 1}


def test_gradients_of_every_micro_batch_would_be_counted(ranks: Ranks) -> None:
    """The control: sums that are reduced in each micro-batch."""
    assert Counter(ranks(run, 2, layout(4, dp_mode="fsdp"), True)[0])[(*REDUCED, "backward")] == 4 * UNITS


def test_hsdp_gathers_inside_a_group_and_sums_shards_across(ranks: Ranks) -> None:
    parallel = ParallelConfig(dp=4, dp_mode="hsdp", dp_shard=2)
    found = ranks(run, 4, Composition("llama", parallel, 2, FP32))
    assert all(answer == found[0] for answer in found)
    assert Counter(found[0]) == {
        ("all_gather", "dp_shard", "float32", "forward"): UNITS,
        ("all_gather", "dp_shard", "float32", "backward"): BLOCKS,
        ("reduce_scatter", "dp_shard", "float32", "backward"): UNITS,
        ("all_reduce", "dp_replicate", "float32", "backward"): UNITS,
        NORM: 1,
    }


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b"])
def test_a_pipeline_gathers_once_a_step(schedule: str, ranks: Ranks) -> None:
    """Two micro-batches: each stage's blocks and its ends, where it has any, once."""
    parallel = ParallelConfig(dp=2, pp=2, dp_mode="fsdp", pp_schedule=schedule)  # type: ignore[arg-type]
    for answer in ranks(run, 4, Composition("llama", parallel, 2, FP32)):
        found = Counter(sent[:3] for sent in answer)
        assert found[GATHERED] == found[REDUCED] == BLOCKS // 2 + 1


# bf16: gathered narrow, reduced wide


def bf16(mode: str, reduce: torch.dtype | None = None) -> tuple[dict[str, np.ndarray], list[Sent]]:
    """On a rank of two: what three steps in bf16 give, micro-batches included; and what one sends."""
    case = layout(2, dp_mode=mode, precision="bf16")
    policy = fsdp.MixedPrecisionPolicy
    if reduce is not None:
        fsdp._policy = lambda stage, dtype: policy(dtype, reduce, cast_forward_inputs=False)
    mesh = Mesh.of(case.parallel, "cpu")
    return steps(case, mesh, build(case.config(), mesh, VOCABULARY))[0], run(case)


@pytest.fixture(scope="module")
def replicated(ranks: Ranks) -> dict[str, np.ndarray]:
    """What replicas in bf16 compute, which have their own proofs."""
    return ranks(bf16, 2, "replicate")[0][0]


@pytest.mark.parametrize("mode", ["fsdp", "zero2"])
def test_bf16_gradients_are_those_of_replicas_bit_for_bit(
    mode: str, replicated: dict[str, np.ndarray], ranks: Ranks
) -> None:
    """The same roundings: bf16 weights and gradients of a micro-batch, fp32 sums over micro-batches and replicas."""
    found, sent = ranks(bf16, 2, mode)[0]
    names = [name for name in found if name.startswith("gradient ")]
    assert len(names) == 3 + 6 * BLOCKS  # four matrices and two norms a block, and the ends
    assert [name for name in names if not np.array_equal(found[name], replicated[name])] == []
    assert found["loss 0"] == replicated["loss 0"]
    assert found["norm 0"] == pytest.approx(replicated["norm 0"], rel=1e-6)
    assert found["loss 2"] == pytest.approx(replicated["loss 2"], abs=0.01)
    dtypes = {(op, dtype) for op, _, dtype, _ in sent}
    assert dtypes == {("all_gather", "bfloat16"), ("reduce_scatter", "float32"), ("all_reduce", "float64")}


def narrow_reduction() -> tuple[dict[str, np.ndarray], list[Sent]]:
    """On a rank: the control, whose gradients are summed in bf16."""
    before = fsdp._policy
    try:
        return bf16("fsdp", torch.bfloat16)
    finally:
        fsdp._policy = before


def test_a_reduction_in_bf16_is_seen(replicated: dict[str, np.ndarray], ranks: Ranks) -> None:
    found, sent = ranks(narrow_reduction, 2)[0]
    assert not np.array_equal(found["gradient norm.weight"], replicated["gradient norm.weight"])
    assert ("reduce_scatter", "dp", "bfloat16", "backward") in sent
