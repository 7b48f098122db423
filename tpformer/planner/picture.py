"""Plans to look at: bars of memory and of time, and the best one's pipeline."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpformer.parallel.bubble import schedule_order, simulate
from tpformer.planner.cost import rank_times
from tpformer.planner.gantt import draw_rank, legend_of
from tpformer.planner.search import Plan

MEMORY = ("parameters", "gradients", "optimizer", "activations", "buffers")
TIME = ("compute", "recompute", "bubble", "tp", "pp", "dp", "optimizer")
MOST_SHOWN = 24
"""Micro-batches, and stages, of the timeline: more cannot be read."""


def plot(path: Path, plans: Sequence[Plan]) -> None:
    """Write the picture as a PNG, whole or not at all."""
    temporary = path.with_suffix(".partial.png")
    draw(plans).savefig(temporary, dpi=120)
    os.replace(temporary, path)


def draw(plans: Sequence[Plan]) -> Any:
    """A bar of memory and a bar of time for each plan and, if it has one, the first one's pipeline."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = 3 if plans[0].candidate.parallel.pp > 1 else 2
    figure = Figure(figsize=(11, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("PREDICTED, not measured", fontsize=10)
    panels = figure.subplots(rows, 1, squeeze=False)[:, 0]
    names = [_name(found) for found in plans]
    _bars(panels[0], names, {p: [getattr(f.memory, p) / 2**30 for f in plans] for p in MEMORY}, "GiB a device")
    panels[0].axvline(plans[0].machine.device.memory / 2**30, color="black", linestyle="--", linewidth=1)
    _bars(panels[1], names, {kind: [f.time.of(kind) for f in plans] for kind in TIME}, "seconds a step")  # type: ignore[arg-type]
    if rows == 3:
        _pipeline(panels[2], plans[0])
    return figure


def _bars(axes: Any, names: list[str], parts: dict[str, list[float]], label: str) -> None:
    left = [0.0] * len(names)
    for part, values in parts.items():
        if any(values):
            axes.barh(range(len(names)), values, left=left, label=part, height=0.7)
            left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _pipeline(axes: Any, found: Plan) -> None:
    """The order of the schedule with this plan's times, of the first micro-batches where there are many."""
    c, p = found.candidate, found.candidate.parallel
    pp, count = min(p.pp, MOST_SHOWN), min(c.micro_batches, max(MOST_SHOWN, 2 * min(p.pp, MOST_SHOWN)))
    count -= count % pp
    per_rank = p.num_stages // p.pp
    busiest = max(rank_times(c, found.machine), key=lambda time: time.all)
    forward, backward = busiest.forward / per_rank, (busiest.backward + busiest.recompute) / per_rank
    cost = {"forward": forward, "backward": backward, "input gradient": backward / 2, "weight gradient": backward / 2}
    spans = simulate(schedule_order(p.pp_schedule, pp, count, p.stages_per_rank), lambda kind, _: cost[kind])
    longest = max(span.end for rank in spans for span in rank)
    for number, rank in enumerate(spans):
        draw_rank(axes, number, rank, 0.0, longest)
    axes.set_title(f"{p.pp_schedule}: {count} of {c.micro_batches} micro-batches on {pp} of {p.pp} ranks", fontsize=9)
    axes.set_ylim(len(spans) - 0.5, -0.5)
    axes.set_xlabel("milliseconds")
    axes.legend(handles=legend_of(spans), fontsize=7, loc="lower right")
    axes.set_yticks(range(len(spans)), [f"rank {number}" for number in range(len(spans))], fontsize=7)


def _name(found: Plan) -> str:
    c, p = found.candidate, found.candidate.parallel
    name = f"tp {p.tp}{' sp' * p.sequence_parallel}, pp {p.pp}"
    name += f" {p.pp_schedule} x{p.num_stages // p.pp}" if p.pp > 1 else ""
    name += f", dp {c.dp} {p.dp_mode}" if c.dp > 1 else ""
    return f"{name}\nmicro-batch {c.micro_batch_size}" + (f", recompute {p.recompute}" if p.recompute != "none" else "")
