"""The plots of benchmarks.scaling: efficiency against degree, where the step's time goes, and memory of each rank."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.scaling_projection import network_line
from benchmarks.scaling_report import label, title

COLORS = {"compute": "tab:gray", "tp": "tab:blue", "pp": "tab:green", "dp": "tab:purple", "idle": "tab:orange"}


def write(stem: Path, record: dict[str, Any]) -> list[Path]:
    """Write the PNGs beside the record; none where matplotlib is not installed, or no job was measured."""
    plots: dict[str, Callable[[Any, dict[str, Any]], None]] = {"efficiency": efficiency, "time": time, "memory": memory}
    if not measured(record):
        return []
    try:
        return [save(stem.with_name(f"{stem.name}_{name}.png"), plot, record) for name, plot in plots.items()]
    except ImportError as error:  # what was measured must not be lost for want of a chart
        print(f"no plots: {error}")
        return []


def save(path: Path, plot: Callable[[Any, dict[str, Any]], None], record: dict[str, Any]) -> Path:
    """Draw one plot and write it, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.4 + 0.3 * max(8, len(measured(record)))), layout="constrained")
    FigureCanvasAgg(figure)
    plot(figure, record)
    figure.suptitle(heading(record), fontsize=9)
    temporary = path.with_suffix(".partial.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)
    return path


def heading(record: dict[str, Any]) -> str:
    """The title of every plot: what of it is no measurement stands there."""
    projected = any(row["projected"] for row in measured(record))
    lines = [title(record), *([network_line(record["network"])] if projected else [])]
    return "\n".join(part for text in lines for part in textwrap.wrap(text, 130))


def measured(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that have numbers."""
    return [row for row in record["jobs"] if row["error"] is None]


def names_on(panel: Any, rows: list[dict[str, Any]]) -> None:
    """A line a job, the first on top, told from the others of its kind by its size."""
    names = [
        f"{label(row)}, {row['parameters'] / 1e6:,.3g}M, {row['batch']} x {row['model']['max_seq_len']}"
        f"{'' if row['micro_batch'] in (row['batch'], row['batch'] // row['degree']) else ' in parts'}"
        for row in rows
    ]
    panel.set_yticks(range(len(rows)), names, fontsize=8)  # by place: two jobs may have one name
    panel.invert_yaxis()


def efficiency(figure: Any, record: dict[str, Any]) -> None:
    """A panel a mode, a line a kind and axis, what others published dashed."""
    modes = [mode for mode in ("strong", "weak") if any(s["mode"] == mode for s in record["series"])]
    panels = figure.subplots(1, len(modes), squeeze=False)[0]
    for panel, mode in zip(panels, modes, strict=True):
        every = [series for series in record["series"] if series["mode"] == mode]
        for series in every:
            title_ = f"{series['kind']} {series['axis']}"
            points = [p for p in zip(series["degrees"], series["efficiency"], strict=True) if p[1] is not None]
            panel.plot([n for n, _ in points], [100 * share for _, share in points], "o-", label=title_)
            known = [p for p in zip(series["degrees"], series["published"] or [], strict=False) if p[1] is not None]
            if known:
                panel.plot([n for n, _ in known], [100 * share for _, share in known], "x--", label="published")
        degrees = sorted({degree for series in every for degree in series["degrees"]})
        panel.axhline(100, color="black", linewidth=0.8, linestyle=":", label="ideal")
        panel.set_xscale("log", base=2)
        panel.set_xticks(degrees, [str(degree) for degree in degrees])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.set_xlabel("processes")
        panel.set_ylabel("efficiency, %")
        panel.set_title(f"{mode} scaling")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="lower left")


def parts(row: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a step by what they go into: computing, communication of each axis, idle."""
    exposed = row["exposed"]
    found = {"compute": exposed["compute_share"]}
    found |= {axis: one["share"] - one["waiting_share"] for axis, one in exposed["axes"].items()}
    return {part: row["median_ms"] * share for part, share in (found | {"idle": exposed["idle_share"]}).items()}


def time(figure: Any, record: dict[str, Any]) -> None:
    """A bar a job: computing, exposed communication by axis, idle."""
    panel = figure.subplots()
    rows = [row for row in measured(record) if row["exposed"]]
    left = [0.0] * len(rows)
    for part, color in COLORS.items():
        values = [parts(row).get(part, 0.0) for row in rows]
        if any(values):
            title_ = {"compute": "compute", "idle": "idle"}.get(part, f"exposed communication, {part}")
            panel.barh(range(len(rows)), values, left=left, color=color, label=title_)
        left = [before + value for before, value in zip(left, values, strict=True)]
    names_on(panel, rows)
    panel.set_xlabel("ms of a step")
    panel.legend(fontsize=8, loc="lower right")


def memory(figure: Any, record: dict[str, Any]) -> None:
    """A bar a job, of its largest rank, and a point for every rank."""
    panel = figure.subplots()
    rows = measured(record)
    known = [[b / 2**20 for b in row["peak_memory_bytes"] if b is not None] for row in rows]
    panel.barh(range(len(rows)), [max(peaks, default=0.0) for peaks in known], color="tab:blue", alpha=0.5)
    for place, peaks in enumerate(known):
        panel.plot(peaks, [place] * len(peaks), "k.", markersize=4)
    names_on(panel, rows)
    panel.set_xlabel("peak memory of a rank in a step, MiB")
