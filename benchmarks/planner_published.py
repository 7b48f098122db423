"""Published step times of large runs beside the planner's predictions: python -m benchmarks.planner --published."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.published import rows
from benchmarks.published_row import Published
from tpformer.parallel_config import ParallelConfig
from tpformer.planner.candidate import Candidate
from tpformer.planner.cost import Machine
from tpformer.planner.hardware import device, link
from tpformer.planner.search import Plan, planned

CLOSE = 0.15
"""Of the published time: what is aimed at for dense models."""
WHY = {
    "2019": "software of 2019, before fused kernels: the next year's on the same GPUs is twice as fast",
    "SC21 ZeRO-3": "gathers that did not run beside the computation",
    "torchtitan 2024": "another H100, of 2.4 TB/s and 500 W",
    "torchtitan 2025": "another H100, of 2.4 TB/s and 500 W",
    "torchtitan 2026": "eager operators, launched one by one",
    "H100": "small operators, launched one by one",
}
"""Why rows are likely to be missed, by their table; none of it was tested."""


@dataclass(frozen=True)
class Compared:
    """A published row and its prediction."""

    row: Published
    plan: Plan

    @property
    def ratio(self) -> float:
        """Predicted over published seconds."""
        return self.plan.seconds / self.row.step_seconds

    @property
    def close(self) -> bool:
        """Whether the prediction is as near as is aimed at."""
        return abs(self.ratio - 1) <= CLOSE


def compare() -> list[Compared]:
    """Every published row; where micro-batches or stages a rank were not published, the fastest of usual ones."""
    return [Compared(row, min(_plans(row), key=lambda plan: plan.seconds)) for row in rows()]


def _plans(row: Published) -> list[Plan]:
    machine = Machine(device(row.device), link(row.network), row.fused_attention)
    found = []
    for size in (row.micro_batch_size,) if row.micro_batch_size else (1, 2, 4):
        for parallel in _layouts(row):
            try:
                candidate = Candidate(row.model, parallel, row.seq_len, row.batch_size, size)
            except ValueError:  # these micro-batches do not divide
                continue
            found.append(planned(candidate, machine))
    if not found:
        raise ValueError(f"{row.table} {row.name}: no micro-batch of 1, 2 or 4 divides its batch ({row.batch_size})")
    return found


def _layouts(row: Published) -> list[ParallelConfig]:
    if row.micro_batch_size or row.parallel.pp == 1:
        return [row.parallel]
    most = row.model.num_layers // row.parallel.pp
    stages = [number for number in (2, 3, 4, 6) if number <= most]
    interleaved = [replace(row.parallel, pp_schedule="interleaved_1f1b", stages_per_rank=n) for n in stages]
    return [row.parallel, *interleaved]


def table(found: list[Compared]) -> str:
    """A line a row; then how many are close, and what is known of the tables that are not."""
    lines = [f"{'table':16} {'run':28} {'GPUs':>5} {'published s':>11} {'predicted s':>11} {'ratio':>6} {'its MFU':>7}"]
    for one in found:
        lines.append(
            f"{one.row.table:16} {one.row.name[:28]:28} {one.row.gpus:>5} {one.row.step_seconds:>11.3f}"
            f" {one.plan.seconds:>11.3f} {one.ratio:>6.2f} {one.plan.mfu:>7.1%}{'' if one.close else '  missed'}"
        )
    lines.append("")
    for name in dict.fromkeys(one.row.table for one in found):
        mine = [one for one in found if one.row.table == name]
        close = sum(one.close for one in mine)
        lines.append(f"{name}: {close} of {len(mine)} rows within {CLOSE:.0%}")
        if close < len(mine):
            lines.append(f"    missed, likely: {WHY.get(name, 'not known why')}")
    return "\n".join(lines)


def record(found: list[Compared]) -> list[dict[str, object]]:
    """For the JSON."""
    return [
        {
            "table": one.row.table,
            "run": one.row.name,
            "device": one.row.device,
            "gpus": one.row.gpus,
            "published_seconds": one.row.step_seconds,
            "predicted_seconds": one.plan.seconds,
            "micro_batch_size": one.plan.candidate.micro_batch_size,
            "stages_per_rank": one.plan.candidate.parallel.stages_per_rank,
            "ratio": one.ratio,
        }
        for one in found
    ]
