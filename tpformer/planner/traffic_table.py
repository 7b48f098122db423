"""A step's traffic as text: by layer, by kind of collective, and for a whole run."""

from collections.abc import Sequence

from tpformer.planner.message import DTYPES, Factors, Traffic
from tpformer.planner.step_traffic import LayerTraffic, StepTraffic

WIDTH = 120
"""Columns of a terminal."""
SHORT = {name: short for short, name in DTYPES.items()} | {"float64": "fp64", "forward": "fwd", "backward": "bwd"}


def traffic_table(found: StepTraffic, *, batches: int = 1, epochs: int = 1) -> str:
    """Three tables of one rank: its layers; its collectives in a step; all of an epoch's batches, and of all epochs.

    batches: optimizer steps of an epoch. Raises ValueError unless both are at least 1.
    """
    for name, number in (("batches", batches), ("epochs", epochs)):
        if number < 1:
            raise ValueError(f"{name} ({number}) must be at least 1")
    return "\n\n".join([_layers(found.layers), _collectives(found), _run(found, batches, epochs)])


def formulas(found: Sequence[Traffic]) -> str:
    """Each kind of collective with its formulas, and the numbers in them."""
    lines = []
    for each in found:
        head = f"{each.op} {each.axis} {each.phase}: {each.what}"
        lines.append(head)
        lines.append(f"    bytes of a call  {_product(each.factors)} = {each.bytes:,}")
        lines.append(f"    calls in a step  {_product(each.call_factors)} = {each.calls:,}")
    return "\n".join(lines)


def size(number: int) -> str:
    """Bytes for people: exact below 10 KiB, then four digits or so."""
    if number < 10 * 2**10:
        return f"{number} B"
    units = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = min(len(units), (number.bit_length() - 1) // 10)
    value = number / 2 ** (10 * power)
    return f"{value:.{1 if value >= 100 else 2}f} {units[power - 1]}"


def _product(factors: Factors) -> str:
    return " x ".join(f"{label} {number:,}" for label, number in factors)


def _layers(layers: Sequence[LayerTraffic]) -> str:
    rows = [("layer", "alike", "parameters", "gradients", "output", "its own calls", "carry")]
    for each in layers:
        calls, carried = sum(t.calls for t in each.sends), sum(t.total for t in each.sends)
        sizes = size(each.gradient_bytes), size(each.output_bytes) if each.output_bytes else "-"
        rows.append((each.name, f"{each.alike:,}", f"{each.parameters:,}", *sizes, f"{calls:,}", size(carried)))
    rows.append(
        (
            "all",
            f"{sum(each.alike for each in layers):,}",
            f"{sum(each.alike * each.parameters for each in layers):,}",
            size(sum(each.alike * each.gradient_bytes for each in layers)),
            "",
            f"{sum(each.alike * t.calls for each in layers for t in each.sends):,}",
            size(sum(each.alike * t.total for each in layers for t in each.sends)),
        )
    )
    return "Of one layer: gradients and calls of a step, output of a micro-batch\n" + _aligned(rows, left=(0,))


def _collectives(found: StepTraffic) -> str:
    rows = [("op", "axis", "dtype", "", "calls", "each", "a step", "ring sends", "hidden", "what")]
    for each in found.step:
        sizes = size(each.bytes), size(each.total), size(each.sent(found.sizes[each.axis]))
        hidden, phase = "yes" if each.hidden else "-", SHORT[each.phase]
        rows.append((each.op, each.axis, SHORT[each.dtype], phase, f"{each.calls:,}", *sizes, hidden, each.what))
    sizes = "", size(found.carried()), size(found.sent())
    rows.append(("all", "", "", "", f"{found.calls():,}", *sizes, "", ""))
    return "Collectives of one step\n" + _aligned(rows, left=(0, 1, 2, 3, 8, 9))


def _run(found: StepTraffic, batches: int, epochs: int) -> str:
    rows = [("axis", "ranks", "calls a step", "an epoch", f"{epochs:,} epochs", "carry", "a rank sends")]
    axes = list(dict.fromkeys(each.axis for each in found.step))
    for axis in [*axes, ""]:
        calls, steps = found.calls(axis), batches * epochs
        counts = f"{calls:,}", f"{calls * batches:,}", f"{calls * steps:,}"
        ranks = f"{found.sizes[axis]:,}" if axis else ""
        rows.append((axis or "all", ranks, *counts, size(found.carried(axis) * steps), size(found.sent(axis) * steps)))
    return f"A run of {epochs:,} x {batches:,} steps\n" + _aligned(rows, left=(0,))


def _aligned(rows: Sequence[tuple[str, ...]], left: tuple[int, ...]) -> str:
    """Columns side by side; the widest of those at the left is cut until a line fits."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    widest = max(left, key=lambda column: widths[column])
    widths[widest] -= max(0, sum(widths) + 2 * (len(widths) - 1) - WIDTH)
    lines = []
    for row in rows:
        cells = [
            _cut(cell, width).ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * min(WIDTH, max(map(len, lines))), *lines[1:]])


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"
