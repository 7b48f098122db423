"""Predicted against measured or published seconds, a point a layout, on the line where they are equal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def plot(path: Path, comparison: dict[str, Any]) -> None:
    """Write the picture of a comparison as benchmarks.planner records it, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known, groups, share = points(comparison)
    figure = Figure(figsize=(6.5, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ends = [0.8 * min(x for pairs in groups.values() for x, _ in pairs)]
    ends += [1.25 * max(x for pairs in groups.values() for x, _ in pairs)]
    axes.plot(ends, ends, color="black", linewidth=1)
    axes.fill_between(ends, [x * (1 - share) for x in ends], [x * (1 + share) for x in ends], color="gray", alpha=0.2)
    for name, pairs in groups.items():
        axes.plot(*zip(*pairs, strict=True), "o", label=name, markersize=4)
    axes.set(xscale="log", yscale="log", xlabel=f"{known} seconds a step", ylabel="PREDICTED seconds a step")
    axes.set_title(f"gray: within {share:.0%}", fontsize=10)
    axes.legend(fontsize=8)
    temporary = path.with_suffix(".partial.png")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)


def points(comparison: dict[str, Any]) -> tuple[str, dict[str, list[tuple[float, float]]], float]:
    """What the known times are; pairs of known and predicted seconds by group; the share that counts as close."""
    groups: dict[str, list[tuple[float, float]]] = {}
    if "rows" in comparison:
        for row in comparison["rows"]:
            groups.setdefault(row["table"], []).append((row["published_seconds"], row["predicted_seconds"]))
        return "published", groups, 0.15
    for layout in comparison["layouts"]:
        pair = layout["measured"]["median_ms"] / 1e3, layout["predicted_ms"] / 1e3
        groups.setdefault(f"{layout['processes']} processes", []).append(pair)
    return "measured", groups, 0.20
