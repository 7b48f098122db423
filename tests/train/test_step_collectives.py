"""A whole training step communicates the model's own collectives, its gradients once, and one norm: nothing else.

The model's own, call by call and byte by byte, are proven in tests/proofs/test_communication.py.
"""

import pytest
import torch

import tpformer
from tests.distributed import Ranks
from tests.proofs.cases import Config, Layout, build, gpt, llama
from tpformer import Key
from tpformer.parallel.data import GradientBuckets
from tpformer.trace import Call
from tpformer.train.optimizer import Optimizer
from tpformer.train.schedule import OptimizerConfig
from tpformer.train.step import StepOptions, train_step

MODELS: dict[str, Config] = {
    "gpt": gpt(),
    "llama": llama(),
    "llama-kv1": llama(num_kv_heads=1),  # copied weights with partial gradients
    "qwen3-kv4": llama(num_kv_heads=4, qk_norm=True),
}
LAYOUTS = [Layout(1), Layout(2), Layout(2, 1, True), Layout(1, 2), Layout(2, 2), Layout(2, 2, True), Layout(4)]
Row = tuple[str, str, str, str, int]
"""One call: op, axis, phase, source file, bytes."""

D, L, KEYS_AND_VALUES = 32, 2, 2 * 8 * 32
NORMS = {"gpt": (4 * L + 2) * D, "llama": (2 * L + 1) * D, "llama-kv1": (2 * L + 1) * D, "qwen3-kv4": (2 * L + 1) * D}


def row(call: Call) -> Row:
    """What of a call does not depend on the line that issues it."""
    return call.op, call.axis, call.phase, call.site.split(":")[0], call.bytes


def step_calls(layout: Layout, bucket_bytes: int) -> dict[str, tuple[list[Row], list[Row], int]]:
    """On a rank, by model: the calls of a step of two micro-batches (the second step that it takes), the calls of
    one such micro-batch alone, and the parameters that this rank holds."""
    mesh, found = layout.mesh(), {}
    samples = torch.randint(101, (8, 9), generator=torch.Generator().manual_seed(1))
    samples = samples.chunk(mesh.dp.size)[mesh.dp.rank]
    for name, config in MODELS.items():
        model = build(config, mesh)
        with tpformer.trace_communication() as own:
            part = samples[: len(samples) // 2]
            model.loss(part[:, :-1], part[:, 1:]).backward()
        model.zero_grad()
        buckets, optimizer = GradientBuckets(model, mesh, bucket_bytes), Optimizer(model, mesh, OptimizerConfig())
        for step in range(2):
            with tpformer.trace_communication() as trace:
                train_step(
                    model,
                    buckets,
                    optimizer,
                    samples,
                    StepOptions(micro_batch_size=len(part), lr=0.01, key=Key(0).fold(step)),
                )
        numbers = sum(p.numel() for p in model.parameters())
        found[name] = list(map(row, trace.calls)), list(map(row, own.calls)), numbers
    return found


def partial_numbers(name: str, layout: Layout) -> int:
    """How many numbers the one all-reduce of partial gradients holds."""
    if layout.tp == 1:
        return 0
    numbers = NORMS[name] if layout.sequence_parallel else 0
    if layout.sequence_parallel and name == "gpt":
        numbers += L * 2 * D + 12 * D  # the biases after a reduce-scatter, and the table of 12 positions
    if name == "llama-kv1":
        numbers += L * KEYS_AND_VALUES
    if name == "qwen3-kv4":
        numbers += L * 2 * 8  # norms of queries and keys, one head wide
    return numbers


def expected_reductions(name: str, layout: Layout, numbers: int) -> list[Row]:
    """The calls of a step that are not the model's own, with all gradients in one bucket, in order."""
    rows: list[Row] = []
    if layout.dp > 1:
        rows.append(("all_reduce", "dp", "backward", "parallel/data.py", 4 * numbers))
    if partial := partial_numbers(name, layout):
        rows.append(("all_reduce", "tp", "forward", "tpformer/placement.py", 4 * partial))
    axes = [axis for axis in ("tp", "dp") if getattr(layout, axis) > 1]
    if axes:  # an axis that is the whole world goes by its own name
        axis = axes[0] if len(axes) == 1 else "world"
        rows.append(("all_reduce", axis, "forward", "train/gradient_norm.py", 24))
    return rows


def is_reduction(call: Row) -> bool:
    """Is it issued outside the model?"""
    return call[3] in ("parallel/data.py", "tpformer/placement.py", "train/gradient_norm.py")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_is_the_model_s_own_collectives_and_these(layout: Layout, ranks: Ranks) -> None:
    for found in ranks(step_calls, layout.world_size, layout, 25 << 20):
        for name, (calls, own, numbers) in found.items():
            assert not any(map(is_reduction, own))
            assert [c for c in calls if not is_reduction(c)] == own + own, name
            assert [c for c in calls if is_reduction(c)] == expected_reductions(name, layout, numbers), name


@pytest.mark.parametrize("layout", [Layout(2, 2), Layout(2, 2, True)], ids=str)
def test_buckets_go_out_among_the_last_backward_s_own_collectives(layout: Layout, ranks: Ranks) -> None:
    """Some long before backward ends, none before it begins: that is the overlap."""
    for found in ranks(step_calls, layout.world_size, layout, 4096):
        for name, (calls, own, numbers) in found.items():
            places = [i for i, call in enumerate(calls) if call[1] == "dp"]
            ends = [i for i, call in enumerate(calls) if call[1] == "tp" and call[2] == "backward"]
            assert len(places) > 4
            assert sum(calls[i][4] for i in places) == 4 * numbers, name
            first_of_backward = len(own) + [call[2] for call in own].index("backward")
            assert first_of_backward < places[0] < places[3] < ends[-1], name
            assert {calls[i][2] for i in places} == {"backward"}
