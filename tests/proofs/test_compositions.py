"""Every way to split a model, composed: three steps are those of one process, and the collectives are as many as said.

`pytest tests/proofs/test_compositions.py --write-table` writes what was found into the README.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.distributed import Ranks
from tests.proofs.cases import TOLERANCE, Measured, mismatches
from tests.proofs.compositions import BATCH, MODELS, Composition, train
from tpformer import ParallelConfig
from tpformer.parallel.offload import ActivationOffload
from tpformer.parallel.split import stage_parts, stages_of

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- compositions: written by the test run -->\n", "<!-- compositions end -->\n"


def row(model: str, micro_batch_size: int = 2, dtype: torch.dtype = torch.float64, **options: Any) -> Composition:
    """A case, on as many processes as its degrees make."""
    parallel = ParallelConfig(**options)
    return Composition(model, parallel, micro_batch_size, dtype, parallel.tp * parallel.pp * (parallel.dp or 1))


SP: dict[str, Any] = {"sequence_parallel": True}
ROWS = [
    row("llama", tp=2),
    row("llama-tied", tp=2, dp=2, **SP),
    row("llama", pp=3, pp_schedule="gpipe", micro_batch_size=8),
    row("gpt-tied", pp=2, pp_schedule="gpipe"),
    row("gpt-tied", pp=4, pp_schedule="1f1b"),
    row("gpt-untied", pp=2, layers_per_stage=(1, 3)),
    row("llama-tied", pp=2, pp_schedule="interleaved_1f1b"),
    row("llama-tied", pp=2, pp_schedule="interleaved_zero_bubble"),
    row("llama-tied", pp=2, pp_schedule="zbv"),
    row("gpt-tied", pp=2, pp_schedule="dualpipev"),
    row("llama-tied", pp=2, tp=2, **SP),
    row("llama", pp=2, tp=2, pp_schedule="zbv"),
    row("gpt-tied", pp=2, dp=2, pp_schedule="interleaved_1f1b", micro_batch_size=1),
    row("llama-tied", pp=2, dp=2, pp_schedule="zbv", micro_batch_size=1),
    row("llama", pp=2, dp=2, dtype=torch.float32),
    row("llama-tied", pp=2, tp=2, dp=2, micro_batch_size=1, **SP),
    row("llama-tied", dp=2, dp_mode="zero2"),
    row("gpt-tied", dp=2, dp_mode="fsdp"),
    row("llama", dp=4, dp_mode="hsdp", dp_shard=2, micro_batch_size=1),
    row("llama-tied", tp=2, dp=2, dp_mode="fsdp", **SP),
    row("gpt-tied", pp=2, dp=2, dp_mode="fsdp"),
    row("llama", pp=2, dp=2, dp_mode="zero2", pp_schedule="interleaved_1f1b", micro_batch_size=1),
    row("llama", tp=2, recompute="full"),
    row("gpt-tied", tp=2, recompute="full", recompute_every=2, **SP),
    row("llama", recompute="selective"),
    row("llama", tp=2, pp=2, recompute="selective", recompute_modules=("attention", "mlp")),
    row("llama", tp=2, dp=2, dp_mode="fsdp", recompute="full"),
    row("llama", offload_activations=True, offload_optimizer=True),
    row("gpt-tied", pp=2, pp_schedule="zbv", recompute="full", offload_activations=True),
    row("llama-tied", dp=2, dp_mode="fsdp", offload_optimizer=True),
    row("llama", tp=2, compile=True, **SP),
    row("gpt-untied", pp=2, compile=True, recompute="full"),
    row("gpt-untied", dp=2, dp_mode="fsdp", compile=True),
    row("llama", pp=2, precision="bf16", dtype=torch.float32),
    row("gpt-untied", pp=2, precision="fp16", fp32_residual=True, dtype=torch.float32),
    row("llama", pp=2, precision="bf16", offload_optimizer=True, recompute="full", dtype=torch.float32),
]


@dataclass
class Found:
    """What the rows gave: for the table."""

    lines: dict[str, str] = field(default_factory=dict)
    alone: dict[Any, Measured] = field(default_factory=dict)


@pytest.fixture(scope="module")
def found() -> Found:
    """Filled in by the rows as they run."""
    return Found()


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_three_steps_are_those_of_one_process(case: Composition, found: Found, ranks: Ranks) -> None:
    """Losses, norms, every gradient, every weight; each collective of a step on the first process, and no other."""
    alone = case.alone()
    if alone not in found.alone:
        found.alone[alone] = train(alone)[0]
    results = ranks(train, case.world_size, case)
    merged: Measured = {}
    for measured, _ in results:
        merged |= {name: x for name, x in measured.items() if name not in merged}
    assert mismatches(found.alone[alone], merged, TOLERANCE[case.dtype]) == []
    for measured, _ in results:  # what several processes have is the same on all
        assert mismatches({n: merged[n] for n in measured}, measured, TOLERANCE[case.dtype]) == []
    counts = results[0][1]
    assert counts == expected_collectives(case)
    found.lines[str(case)] = line(case, counts)


@pytest.mark.parametrize("case", [row for row in ROWS if row.parallel.offload_activations], ids=str)
def test_what_is_said_to_be_offloaded_is(case: Composition, ranks: Ranks) -> None:
    """By every process; models so small would move nothing by default."""
    assert min(ranks(offloaded_storages, case.world_size, case)) > 0


def offloaded_storages(case: Composition) -> int:
    """On a rank: how many tensors were moved to the host in three steps."""
    with patch.object(ActivationOffload, "_keep", autospec=True, side_effect=ActivationOffload._keep) as keep:
        train(case)
    return keep.call_count


def expected_collectives(case: Composition) -> dict[str, int]:
    """Of a step, on the first process, by op and axis."""
    p = case.parallel
    parts = stage_parts(MODELS[case.model], p, 8)
    mine = [parts[stage] for stage in stages_of(0, p)]
    blocks = sum(len(part.layers) for part in mine)
    first, last = (sum(getattr(part, end) for part in mine) for end in ("first", "last"))
    count = BATCH // (p.dp or 1) // case.micro_batch_size
    found: Counter[str] = Counter()
    if p.tp > 1 and p.sequence_parallel:
        # two regions a block, each entered and left, forward and backward; a column's input is gathered once more
        found["reduce_scatter tp"] += count * (4 * blocks + first + last)
        found["all_gather tp"] += count * (6 * blocks + first + 2 * last)
        found["all_reduce tp"] += 1  # partial gradients
    elif p.tp > 1:
        found["all_reduce tp"] += count * (4 * blocks + first + last)
        found["all_gather tp"] += count * last  # the loss's statistics
    found.update(replayed(p, count, [layer for part in mine for layer in part.layers]))
    if p.pp > 1:
        down, up = (sum(1 for part in mine if not getattr(part, end)) for end in ("last", "first"))
        tied = MODELS[case.model].tie_embeddings and not (first and last)
        found["send pp"] += count * (down + up) + tied
        found["recv pp"] += count * (down + up) + tied
    if p.dp_mode != "replicate":
        axis, ends = "dp_shard" if p.dp_mode == "hsdp" else "dp", sum(part.first or part.last for part in mine)
        # a pipeline, and zero2, gather once a step; the others each block twice a micro-batch, and the ends once
        once = p.pp > 1 or p.dp_mode == "zero2"
        found[f"all_gather {axis}"] += blocks + ends if once else count * (2 * blocks + ends)
        found[f"reduce_scatter {axis}"] += blocks + ends
        found["all_reduce dp_replicate"] += (blocks + ends) * (p.dp_mode == "hsdp")
    elif (p.dp or 1) > 1:
        found["all_reduce dp"] += 1  # one bucket
    alone = [axis for axis in ("tp", "pp", "dp") if (getattr(p, axis) or 1) == case.world_size > 1]
    found[f"all_reduce {alone[0] if alone else 'world'}"] += case.world_size > 1  # the norm, with the loss
    return {name: number for name, number in found.items() if number}


def replayed(p: ParallelConfig, count: int, layers: list[int]) -> dict[str, int]:
    """What recomputation sends again: of a block, all but its last sum; of attention or mlp, what enters it."""
    core = p.recompute == "selective" and p.recompute_modules == ("attention.core",)
    if p.tp == 1 or p.recompute == "none" or core:
        return {}
    again = count * sum(layer % p.recompute_every == 0 for layer in layers)
    if p.recompute == "selective":
        return {"all_gather tp": again * len(p.recompute_modules)} if p.sequence_parallel else {}
    if p.sequence_parallel:
        return {"all_gather tp": 2 * again, "reduce_scatter tp": again}
    return {"all_reduce tp": again}


def line(case: Composition, counts: dict[str, int]) -> str:
    """A row of the README's table."""
    p = case.parallel
    replicas = f"{p.dp or 1}{f' {p.dp_mode}' if p.dp_mode != 'replicate' else ''}{f' {p.dp_shard}' * (p.dp_shard > 0)}"
    layout = f"| {case.model} | {p.tp}{' sp' if p.sequence_parallel else ''} | {p.pp} | {replicas}"
    schedule = "" if p.pp == 1 else f"{p.pp_schedule}, {BATCH // (p.dp or 1) // case.micro_batch_size}"
    modules = f" {' '.join(p.recompute_modules)}" if p.recompute == "selective" else ""
    every = f" every {p.recompute_every}" if p.recompute_every > 1 else ""
    moved = [name for name in ("activations", "optimizer") if getattr(p, f"offload_{name}")]
    memory = [f"recompute {p.recompute}{modules}{every}"] * (p.recompute != "none")
    memory += [f"offload {' '.join(moved)}"] * bool(moved) + ["compile"] * p.compile
    memory += [p.precision] * (p.precision != "fp32") + ["fp32 residual"] * p.fp32_residual
    number = {"float64": "fp64, 1e-10", "float32": "fp32, 1e-5"}[str(case.dtype).removeprefix("torch.")]
    calls = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return f"{layout} | {schedule} | {', '.join(memory)} | {number} | {calls} |"


def test_the_readme_has_this_table(found: Found, request: pytest.FixtureRequest) -> None:
    """Which is what the rows gave, each of them."""
    if len(found.lines) < len(ROWS):
        return  # only some of the rows were asked for, or some failed
    columns = ("model", "tp", "pp", "dp", "schedule, micro-batches", "memory, precision", "compared in", "collectives")
    head = f"| {' | '.join(columns)} |\n"
    table = head + "|---" * 8 + "|\n" + "\n".join(found.lines[str(case)] for case in ROWS) + "\n"
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    if request.config.getoption("--write-table"):
        README.write_text(before + BEGIN + table + END + after)
    assert rest.split(END)[0] == table or request.config.getoption("--write-table")
