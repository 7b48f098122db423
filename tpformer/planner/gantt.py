"""The bars of a pipeline's timeline, measured or predicted, on a matplotlib axes."""

from collections.abc import Sequence
from typing import Any

from tpformer.parallel.timeline import Kind, Span

COLORS: dict[Kind, str] = {
    "forward": "#4c8bd6",
    "backward": "#e0873a",
    "input gradient": "#e0b13a",
    "weight gradient": "#5fa85f",
    "optimizer": "#9a7fbf",
}


def draw_rank(axes: Any, number: int, rank: Sequence[Span], zero: float, longest: float) -> None:
    """A rank's row: a bar a span with its micro-batch's number; zero, longest: seconds that the axes shows."""
    stages = stages_of(rank)
    for span in rank:
        left, width = (span.start - zero) * 1e3, (span.end - span.start) * 1e3
        # the later stages of a rank are paler
        alpha = 1.0 if span.stage < 0 else 1 - 0.55 * stages.index(span.stage) / len(stages)
        bar = axes.barh(number, width, left=left, height=0.8, color=COLORS[span.kind], alpha=alpha)
        bar[0].set(edgecolor="white", linewidth=0.5)
        if span.micro_batch >= 0 and width > longest * 1e3 * 0.012 * len(str(span.micro_batch)):
            axes.text(left + width / 2, number, str(span.micro_batch), ha="center", va="center", fontsize=8)


def legend_of(ranks: Sequence[Sequence[Span]]) -> list[Any]:
    """The colours that occur, and what paler ones mean where a rank has several stages."""
    from matplotlib.patches import Patch

    shown = {span.kind for rank in ranks for span in rank}
    legend = [Patch(color=color, label=kind) for kind, color in COLORS.items() if kind in shown]
    if any(len(stages_of(rank)) > 1 for rank in ranks):
        legend.append(Patch(color="gray", alpha=0.45, label="paler: the rank's later stages"))
    return legend


def stages_of(rank: Sequence[Span]) -> list[int]:
    """The stages whose work is among the spans."""
    return sorted({span.stage for span in rank if span.stage >= 0})
