"""What the kernel benchmark shows: a table, how the targets were met, and a plot for each op."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.kernel_cases import BUILDERS, DIRECTIONS
from benchmarks.kernel_providers import CUDNN, FLASH, LIGER, LIGER_MEGATRON, MATMULS, NAMES, OURS

Row = dict[str, Any]
COPY = "copy"
HUES = ("#d62728", "#7f7f7f", "#1f77b4", "#2ca02c", "#98df8a", "#9467bd", "#ff7f0e", "#17becf", "#bcbd22")
COLORS = dict(zip(NAMES, HUES, strict=True))


@dataclass(frozen=True)
class Target:
    """A promise about one op: a fraction of copy bandwidth, or how its time compares with another provider's."""

    op: str
    direction: str
    against: str
    """copy, or a provider."""
    bound: float
    """At least this fraction of copy, or this many times as fast; with `at_most`, at most this many times its time."""
    at_most: bool = False

    @property
    def text(self) -> str:
        """The promise in words."""
        unit = "of copy" if self.against == COPY else ("x time of " if self.at_most else "x as fast as ") + self.against
        space = "" if unit.startswith("x") else " "
        return f"{self.op} {self.direction} {'<=' if self.at_most else '>='} {self.bound:.2f}{space}{unit}"


def _targets() -> Iterator[Target]:
    for op in ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"):
        yield Target(op, "forward", COPY, 0.90)
        yield Target(op, "backward", COPY, 0.80)
        if op != "add_layer_norm":  # which Liger does not have
            yield Target(op, "backward", LIGER, 2.0)
    for op in ("split_and_rotate", "gated_activation", "bias_gelu"):
        yield Target(op, "forward", COPY, 0.90)
        yield Target(op, "backward", COPY, 0.90)
    yield Target("softmax", "forward", COPY, 0.90)
    yield Target("attention", "forward", CUDNN, 0.75)
    yield Target("attention", "forward", FLASH, 1.20)
    yield Target("attention", "backward", FLASH, 0.90)
    yield Target("cross_entropy", "both", LIGER, 2.5)
    yield Target("cross_entropy", "both", LIGER_MEGATRON, 2.5)
    yield Target("cross_entropy", "both", COPY, 0.75)
    yield Target("linear_cross_entropy", "both", MATMULS, 1.10, at_most=True)


TARGETS = tuple(_targets())


def judge(rows: list[Row], on_cuda: bool) -> list[dict[str, Any]]:
    """Each target at each main size: measured and met, or None and None; on a CPU none is measured."""
    timed = [row for row in rows if row["main"] and "error" not in row] if on_cuda else []
    judged = []
    for target in TARGETS:
        here = [row for row in timed if (row["op"], row["direction"]) == (target.op, target.direction)]
        found = []
        for ours in (row for row in here if row["provider"] == OURS):
            measured = ours["fraction"] if target.against == COPY else _compared(target, ours, here)
            if measured is not None:
                met = measured <= target.bound if target.at_most else measured >= target.bound
                found.append({"size": ours["size"], "measured": measured, "met": met})
        judged += [
            {"target": target.text, "bound": target.bound, **result}
            for result in found or [{"size": None, "measured": None, "met": None}]
        ]
    return judged


def _compared(target: Target, ours: Row, rows: list[Row]) -> float | None:
    theirs = [row for row in rows if row["provider"] == target.against and row["shape"] == ours["shape"]]
    if not theirs:
        return None
    ratio = theirs[0]["median_ms"] / ours["median_ms"]
    return 1 / ratio if target.at_most else ratio


def verdicts(judged: list[dict[str, Any]]) -> Iterator[str]:
    """The targets for the terminal, a line each."""
    yield "targets"
    for entry in judged:
        name = f"  {entry['target']}{'' if entry['size'] is None else ' (' + entry['size'] + ')'}"
        if entry["measured"] is None:
            result = "not measured"
        elif entry["met"]:
            result = f"{entry['measured']:.3f}  met"
        else:
            result = f"{entry['measured']:.3f}  missed by {abs(entry['measured'] - entry['bound']):.3f}"
        yield f"{name:70}{result}"


def table(rows: list[Row]) -> Iterator[str]:
    """The rows for the terminal, up to 100 columns: a block for each op and shape, a line for each provider."""

    def place(row: Row) -> tuple[Any, ...]:
        return row["op"], row["size"], tuple(row["shape"].values()), row["dtype"]

    for (op, size, shape, dtype), block in groupby(rows, place):
        group = list(block)
        unit, ceiling = ("TFLOP/s", "of mm") if any(row.get("flops") for row in group) else ("GB/s", "of copy")
        sizes = " x ".join(map(str, shape))
        yield f"\n{op}  {sizes}  {dtype}  ({size})"
        yield f"{'':16}" + "".join(f"{name:>28}" for name in DIRECTIONS)
        yield f"{'provider':16}" + "".join(f"{'ms':>11}{unit:>9}{ceiling:>8}" for _ in DIRECTIONS)
        for provider in dict.fromkeys(row["provider"] for row in group):
            mine = [row for row in group if row["provider"] == provider]
            errors = [row["error"] for row in mine if "error" in row]
            cells = {row["direction"]: _cell(row) for row in mine if "error" not in row}
            if cells:
                yield f"{provider:16}" + "".join(f"{cells.get(name, '-'):>28}" for name in DIRECTIONS)
            yield from (f"{provider:16}  {error}"[:100] for error in errors)


def _cell(row: Row) -> str:
    return f"{row['median_ms']:11.4f}{_rate(row):9.1f}{row['fraction']:8.2f}"


def _rate(row: Row) -> float:
    return row["tflops"] if row["flops"] else row["gb_per_s"]


def plot(op: str, rows: list[Row], device: str, path: Path) -> None:
    """Rate against size, a panel for each direction, the ceiling dashed; another model's widths are lone marks."""
    timed = [row for row in rows if "error" not in row]
    directions = [name for name in DIRECTIONS if any(row["direction"] == name for row in timed)]
    figure = Figure(figsize=(1 + 4.2 * max(1, len(directions)), 4.2), layout="constrained")
    panels = figure.subplots(1, max(1, len(directions)), squeeze=False, sharey=True)[0]
    for panel, direction in zip(panels, directions, strict=False):
        here = [row for row in timed if row["direction"] == direction]
        for provider in (name for name in NAMES if any(row["provider"] == name for row in here)):
            _draw(panel, provider, [row for row in here if row["provider"] == provider])
        ceiling = sorted({row["work"]: row["ceiling"] for row in map(_with_work, here)}.items())
        panel.plot(*zip(*ceiling, strict=True), "--", color="black", label="ceiling", linewidth=1)
        panel.set(xscale="log", title=direction, xlabel="GFLOP" if here[0]["flops"] else "MB (least to move)")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    if directions:
        panels[0].set_ylabel("TFLOP/s" if timed[0]["flops"] else "GB/s")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    sizes = list(dict.fromkeys(row["size"] for row in timed))
    others = f" (lines: {sizes[0]}, squares: {', '.join(sizes[1:])})" if len(sizes) > 1 else ""
    figure.suptitle(f"{op} on {device}{others}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _with_work(row: Row) -> Row:
    return row | {"work": row["flops"] / 1e9 if row["flops"] else row["bytes"] / 1e6}


def _draw(panel: Any, provider: str, rows: Iterable[Row]) -> None:
    """A line through the first size's rows, by shape; the others' as marks of the same colour."""
    points = [_with_work(row) for row in rows]
    first = points[0]["size"]
    line = sorted((row["work"], _rate(row)) for row in points if row["size"] == first)
    panel.plot(*zip(*line, strict=True), "o-", color=COLORS[provider], label=provider, markersize=4)
    for row in points:
        if row["size"] != first:
            panel.plot([row["work"]], [_rate(row)], "s", color=COLORS[provider], markersize=5, fillstyle="none")


def in_order(rows: list[Row]) -> list[Row]:
    """By op, keeping the order within each."""
    return sorted(rows, key=lambda row: list(BUILDERS).index(row["op"]))
