"""What the profile of a step leaves behind: a record, its table and its bar chart."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.one_gpu_report import title
from benchmarks.step_groups import GROUPS, OTHER, RANGES, group_of
from benchmarks.step_trace import Piece

MOST_OTHER = 0.1  # of the busy time, that no group may know, before the table of groups is called incomplete
NAMED = 5  # names a group that the record keeps, the slowest ones


def groups(pieces: Iterable[Piece], rounds: int) -> list[dict[str, Any]]:
    """A row for every group that took time and for `other`, the slowest first; all per step, shares of their sum."""
    members: dict[str, list[Piece]] = {name: [] for name in GROUPS}
    for piece in pieces:
        members[group_of(piece.names)].append(piece)
    total = sum(piece.ms for found in members.values() for piece in found)
    rows = []
    for name, found in members.items():
        if found or name == OTHER:
            ms = sum(piece.ms for piece in found)
            parts = {f"{part}_ms": sum(p.ms for p in found if p.part == part) / rounds for part in RANGES}
            row = {"group": name, "ms": ms / rounds, "share": ms / total if total else 0.0} | parts
            rows.append(row | {"calls": len(found) / rounds, "slowest": slowest(found, rounds)})
    return sorted(rows, key=lambda row: -row["ms"])


def slowest(pieces: list[Piece], rounds: int) -> list[dict[str, Any]]:
    """The names that took longest, each with the operator around it, if any, and its ms per step."""
    times: dict[tuple[str, ...], float] = defaultdict(float)
    for piece in pieces:
        times[piece.names[:2]] += piece.ms
    longest = sorted(times.items(), key=lambda item: -item[1])[:NAMED]
    return [{"name": own, "inside": [*around], "ms": ms / rounds} for (own, *around), ms in longest]


def label(entry: dict[str, Any]) -> str:
    """A short name without namespaces; of torch's nameless elementwise kernels, of the operator that launched them."""
    name = re.sub(r"^void |\(anonymous namespace\)::", "", entry["name"])
    name = re.sub(r"[<(].*$", "", name).strip()
    if name.startswith(("at::native::", "cutlass::")) and entry["inside"]:
        name = entry["inside"][0]
    return name.split("::")[-1]


def write(stem: Path, record: dict[str, Any]) -> None:
    """Write <stem>.json, print the table, and write <stem>.png where matplotlib is installed."""
    harness.write_json(stem.with_suffix(".json"), record)
    print("\n".join(["", *table(record), f"written to {stem}.json"]), flush=True)
    try:
        plot(stem.with_suffix(".png"), record)
    except ImportError as error:  # what was measured must not be lost for want of a chart
        print(f"no chart: {error}")


def table(record: dict[str, Any]) -> list[str]:
    """The record as lines of at most 80 columns."""
    lines = [
        title(record)[:80],
        f"{'':14}{'ms':>9}{'share %':>9}{'forward':>9}{'backward':>9}{'calls':>7} slowest"[:80],
    ]
    lines += [line(row) for row in record["groups"]]
    if record["idle_ms"] is not None:
        lines.append(f"{'idle':14}{record['idle_ms']:9.2f}   of the step, beside the kernels")
    lines.append(f"{'sum':14}{record['busy_ms']:9.2f}{100:9.1f}")
    cost = record["profiled_step_ms"] / record["step_ms"] - 1
    lines.append(
        f"{'step':14}{record['step_ms']:9.2f}   by the clock; with the profiler "
        f"{record['profiled_step_ms']:.2f} ({100 * cost:+.1f} %)"
    )
    return lines + warnings(record["groups"])


def line(row: dict[str, Any]) -> str:
    """One group of the table."""
    name = label(row["slowest"][0]) if row["slowest"] else "-"
    return (
        f"{row['group']:14}{row['ms']:9.2f}{100 * row['share']:9.1f}{row['forward_ms']:9.2f}"
        f"{row['backward_ms']:9.2f}{row['calls']:7.0f} {name}"
    )[:80]


def warnings(rows: list[dict[str, Any]]) -> list[str]:
    """A line if more of the time than a tenth has names that no group knows, with the names; else none."""
    other = next(row for row in rows if row["group"] == OTHER)
    if other["share"] <= MOST_OTHER:
        return []
    return [
        f"warning: no group knows {100 * other['share']:.1f} % of the time; step_groups.py needs a pattern for",
        *(f"  {' in '.join([entry['name'], *entry['inside']])}"[:80] for entry in other["slowest"]),
    ]


def plot(path: Path, record: dict[str, Any]) -> None:
    """A PNG with a bar for each group, its forward full, the rest of it pale; time and share written on it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = record["groups"]
    figure = Figure(figsize=(9, 1.6 + 0.36 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names, colors = [row["group"] for row in rows], [GROUPS[row["group"]].color for row in rows]
    forward = [row["forward_ms"] for row in rows]
    rest = [row["ms"] - row["forward_ms"] for row in rows]
    axes.barh(names, forward, color=colors)
    bars = axes.barh(names, rest, left=forward, color=colors, alpha=0.5)
    axes.bar_label(bars, [f"{row['ms']:.2f} ms  {100 * row['share']:.1f} %" for row in rows], padding=4)
    after = "backward, optimizer" if record["optimizer"] else "backward"
    axes.legend(handles=[Patch(color="black", label="forward"), Patch(color="black", alpha=0.5, label=after)], loc=4)
    axes.margins(x=0.3)
    axes.invert_yaxis()
    idle = "" if record["idle_ms"] is None else f", idle {record['idle_ms']:.1f} ms"
    axes.set_xlabel(f"ms of a step of {record['step_ms']:.1f} ms{idle}")
    axes.set_title(title(record), fontsize=10)
    temporary = path.with_suffix(".partial.png")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)
