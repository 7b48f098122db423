"""A measured step of the pipeline for people: every rank's spans gathered, in a table and as a picture."""

import itertools
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpformer.collectives import gather_stack
from tpformer.mesh import Mesh
from tpformer.parallel.bubble import Order, disorder, schedule_order, simulate, theoretical_bubble
from tpformer.parallel.timeline import KINDS, Kind, Span, idle_seconds, idle_share, pipeline_window
from tpformer.parallel_config import Schedule
from tpformer.planner.gantt import draw_rank, legend_of, stages_of


@dataclass(frozen=True)
class MeasuredStep:
    """What each pipeline rank did in one step, and the schedule that it followed.

    Raises ValueError if a rank did other work than the schedule has for it, or did it in another order.
    """

    schedule: Schedule
    micro_batches: int
    ranks: Sequence[Sequence[Span]]
    stages_per_rank: int = 0

    def __post_init__(self) -> None:
        for number, (rank, planned) in enumerate(zip(self.ranks, self._order(), strict=True)):
            spans = sorted((span for span in rank if span.kind != "optimizer"), key=lambda span: (span.start, span.end))
            # a piece of work may come in several spans, as a forward and its loss
            done = [work for work, _ in itertools.groupby(spans, lambda span: span[:3])]
            for found, action in itertools.zip_longest(done, planned):
                if found != action:
                    raise ValueError(f"rank {number} did {_work(found)} where {self.schedule} has {_work(action)}")

    def _order(self) -> Order:
        return schedule_order(self.schedule, len(self.ranks), self.micro_batches, self.stages_per_rank)

    @property
    def theory(self) -> float:
        """The idle share of the schedule where all stages are alike."""
        return theoretical_bubble(self.schedule, len(self.ranks), self.micro_batches, self.stages_per_rank)

    @property
    def theory_of_these_stages(self) -> float:
        """The idle share of the schedule where each stage takes the mean time that it was measured to take."""
        seconds: defaultdict[tuple[Kind, int], float] = defaultdict(float)
        numbers: defaultdict[tuple[Kind, int], set[int]] = defaultdict(set)
        for span in (span for rank in self.ranks for span in rank):
            seconds[span.kind, span.stage] += span.end - span.start
            numbers[span.kind, span.stage].add(span.micro_batch)
        return idle_share(simulate(self._order(), lambda *work: seconds[work] / len(numbers[work])))


def gather_spans(spans: Sequence[Span], mesh: Mesh) -> list[list[Span]]:
    """The spans of every pipeline rank of replica 0 (dp rank 0, tp rank 0), on every rank of the world; collective."""
    rows = [(KINDS.index(span.kind), *span[1:]) for span in spans]
    mine = torch.tensor(rows, dtype=torch.float64, device=mesh.device).view(-1, 5)  # (spans, 5)
    counts = gather_stack(torch.tensor(len(mine), device=mesh.device), mesh.world).tolist()
    padded = mine.new_zeros(max(counts), 5)
    padded[: len(mine)] = mine
    gathered = gather_stack(padded, mesh.world)  # (world, most spans, 5)
    # ranks count tp first, then dp, then pp
    return [
        [Span(KINDS[int(row[0])], int(row[1]), int(row[2]), row[3], row[4]) for row in gathered[rank, :count].tolist()]
        for rank, count in list(enumerate(counts))[:: mesh.dp.size * mesh.tp.size]
    ]


def table(step: MeasuredStep) -> str:
    """Milliseconds and shares of the pipeline's time, a line a rank and stage; then the bubble, measured and in theory.

    Idle time and the optimizer are the rank's, and stand in the line of its first stage. Raises ValueError if spans of
    a rank overlap.
    """
    start, end = pipeline_window(step.ranks)
    lines = [
        f"{'rank':>4} {'stage':>5} {'forward':>10} {'backward':>10} {'weight gradient':>16} {'optimizer':>10}"
        f" {'idle':>10} {'working':>8} {'idle':>7}",
        f"{'':>10} {'ms':>10} {'ms':>10} {'ms':>16} {'ms':>10} {'ms':>10} {'share':>8} {'share':>7}",
    ]
    for number, (rank, idle) in enumerate(zip(step.ranks, idle_seconds(step.ranks), strict=True)):
        optimizer = _seconds(rank, "optimizer")
        for place, stage in enumerate(stages_of(rank)):
            spans = [span for span in rank if span.stage == stage]
            forward, weight = _seconds(spans, "forward"), _seconds(spans, "weight gradient")
            backward = _seconds(spans, "backward", "input gradient")
            lines.append(
                f"{number:>4} {stage:>5} {forward * 1e3:>10.2f} {backward * 1e3:>10.2f} {weight * 1e3:>16.2f}"
                + (f" {optimizer * 1e3:>10.2f} {idle * 1e3:>10.2f}" if place == 0 else " " * 22)
                + f" {(forward + backward + weight) / (end - start):>8.1%}"
                + (f" {idle / (end - start):>7.1%}" if place == 0 else "")
            )
    lines += [
        f"{_named(step)}: the pipeline's part of the step took {(end - start) * 1e3:.2f} ms",
        f"idle {idle_share(step.ranks):.1%} measured, {step.theory:.1%} in theory with stages all alike, "
        f"{step.theory_of_these_stages:.1%} with stages as slow as these",
    ]
    early = disorder(step.ranks)
    if early > 0:
        lines.append(f"the ranks' clocks differ: a span begins {early * 1e3:.3f} ms before what it waits for has ended")
    return "\n".join(lines)


def plot(path: Path, steps: Sequence[MeasuredStep]) -> None:
    """Write the steps' Gantt charts as one PNG, one above the other on the same scale of time."""
    temporary = path.with_suffix(".partial.png")
    draw(steps).savefig(temporary, dpi=120)
    os.replace(temporary, path)


def draw(steps: Sequence[MeasuredStep]) -> Any:
    """The matplotlib figure of `plot`: a panel a step, a row a rank, a bar a span with its micro-batch's number.

    Raises ValueError if there is no step, or if spans of a rank overlap.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not steps:
        raise ValueError(f"there is nothing to draw in {len(steps)} steps")
    heights = [1.2 + 0.4 * len(step.ranks) for step in steps]
    figure = Figure(figsize=(11, sum(heights) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(steps), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    longest = max(max(span.end for rank in step.ranks for span in rank) - _zero(step) for step in steps)
    for axes, step in zip(panels, steps, strict=True):
        axes.set_title(
            f"{_named(step)}: idle {idle_share(step.ranks):.1%} measured, {step.theory:.1%} in theory", fontsize=10
        )
        for number, rank in enumerate(step.ranks):
            draw_rank(axes, number, rank, _zero(step), longest)
        axes.set_yticks(range(len(step.ranks)), [f"rank {number}" for number in range(len(step.ranks))])
        axes.set_ylim(len(step.ranks) - 0.5, -0.5)  # the first rank on top
        axes.tick_params(left=False)
    panels[-1].set_xlim(0, longest * 1e3 * 1.005)
    panels[-1].set_xlabel("milliseconds")
    legend = legend_of([rank for step in steps for rank in step.ranks])
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    return figure


def _work(action: tuple[Kind, int, int] | None) -> str:
    return "nothing" if action is None else f"the {action[0]} of micro-batch {action[2]} on stage {action[1]}"


def _named(step: MeasuredStep) -> str:
    return f"{step.schedule}, p = {len(step.ranks)}, m = {step.micro_batches}"


def _zero(step: MeasuredStep) -> float:
    return pipeline_window(step.ranks)[0]


def _seconds(spans: Sequence[Span], *kinds: Kind) -> float:
    return sum(span.end - span.start for span in spans if span.kind in kinds)
