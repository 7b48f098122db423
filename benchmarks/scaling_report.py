"""The table that benchmarks.scaling prints: a line for every degree of every series, and what explains it."""

from __future__ import annotations

import textwrap
from typing import Any

from benchmarks.scaling_projection import network_line

WIDTH = 120
LEGEND = (
    "eff: FLOP/s of a rank over those of the same kind's one process (strong scaling: t1 / n tn); /plain: over plain's",
    "exposed: of the step, in which communication stands in the way; idle: of that, waiting until another rank comes",
    "calls, MiB: collectives of a step and their payload, and peak: MiB of memory, each of the rank with most",
)


def table(record: dict[str, Any]) -> list[str]:
    """The record as lines of at most 120 columns."""
    lines = [
        title(record),
        f"{'kind':15}{'axis':5}{'mode':7}{'n':>2} {'ms':>7}{'p20':>7}{'p80':>7}{'quiet':>6}{'tok/s':>8}{'eff %':>6}"
        f"{'/plain':>7}{'publ.':>6}{'exposed':>8}{'idle':>5}{'calls':>6}{'MiB':>7}{'peak':>6}{'MFU':>4}",
    ]
    for series in record["series"]:
        for place, number in enumerate(series["jobs"]):
            row = record["jobs"][number]
            if row["error"] is None:
                lines.append(line(series, place, row, cores=_places(record)))
    wrapped = (textwrap.wrap(text, WIDTH, subsequent_indent="  ") for text in notes(record))
    return [text[:WIDTH] for text in lines] + [text for texts in wrapped for text in texts]


def title(record: dict[str, Any]) -> str:
    """What was measured where, in one line."""
    config = record["config"]
    return (
        f"scaling of {config['preset']}: forward + backward + sums of gradients, {config['threads']} thread(s) a rank, "
        f"{record['environment']['device']}"
    )


def line(series: dict[str, Any], place: int, row: dict[str, Any], cores: int | None) -> str:
    """One degree of a series."""
    degree = series["degrees"][place]
    crowded = cores is not None and degree > cores and not row["projected"]
    quiet = f"{row['quiet']}/{row['total']}{'*' if row['used_all'] else ''}"
    around = "     PROJECTED" if row["projected"] else milliseconds(row["p20_ms"]) + milliseconds(row["p80_ms"])
    published = series["published"][place] if series["published"] else None
    exposed = row["exposed"] or {"exposed_share": None, "idle_share": None}
    peak = max((bytes_ for bytes_ in row["peak_memory_bytes"] if bytes_ is not None), default=None)
    calls, payload = traffic(row)
    who = f"{row['kind']:15}{series['axis']:5}{series['mode']:7}{degree:2}{'!' if crowded else ' '}"
    return (
        f"{who}{milliseconds(row['median_ms'])}{around}{quiet:>6}{row['tokens_per_second']:8.0f}"
        f"{percent(series['efficiency'][place], 6)}{percent(series['efficiency_to_plain'][place], 7)}"
        f"{percent(published, 6)}{percent(exposed['exposed_share'], 8)}{percent(exposed['idle_share'], 5, 0)}"
        f"{calls:6}{payload / 2**20:7.1f}{'-' if peak is None else format(peak / 2**20, '.0f'):>6}"
        f"{percent(row['mfu'], 4, 0)}"
    )


def milliseconds(value: float) -> str:
    """Seven columns."""
    return f" {value:6.1f}" if value < 1000 else f" {value:6.0f}"


def percent(share: float | None, width: int, digits: int = 1) -> str:
    """A share as per cent, or a dash."""
    return f"{'-' if share is None else format(100 * share, f'.{digits}f'):>{width}}"


def traffic(row: dict[str, Any]) -> tuple[int, int]:
    """Collectives and bytes of a step, of the rank with the most bytes."""
    ranks = [
        (sum(call["calls"] * call["bytes_each"] for call in calls), sum(call["calls"] for call in calls))
        for calls in row["communication"]
    ]
    payload, count = max(ranks, default=(0, 0))
    return count, payload


def notes(record: dict[str, Any]) -> list[str]:
    """Failures, what multiplies matrices, sources, and the table's words."""
    rows = record["jobs"]
    failed = [f"{label(row)} failed: {row['error']}" for row in rows if row["error"] is not None]
    backends = {row["kind"]: row["gemm_backend"] for row in rows if row["error"] is None}
    by_backend = {
        backend: [kind for kind, used in backends.items() if used == backend] for backend in backends.values()
    }
    matmul = [f"matrices are multiplied by {backend}: {', '.join(kinds)}" for backend, kinds in by_backend.items()]
    sources = {
        s["published_source"]: f"publ. ({s['axis']}, {s['mode']}): {s['published_source']}"
        for s in record["series"]
        if s["published"]
    }
    peak = [f"peak memory is {record['peak_memory_is']}"]
    projected = [network_line(record["network"])] if record["network"] else []
    crowded = _places(record) is not None and any(r["degree"] > _places(record) and not r["projected"] for r in rows)
    signs = ["! oversubscribed: more processes than the machine has cores"] if crowded else []
    if any(row["error"] is None and row["used_all"] for row in rows):
        signs.append("* fewer than 3 samples were quiet: all were used")
    return [*failed, *matmul, *sources.values(), *projected, *signs, *LEGEND, *peak]


def label(row: dict[str, Any]) -> str:
    """A job's name for people."""
    return f"{row['kind']} {row['axis']}={row['degree']}{' PROJECTED' * row['projected']}"


def _places(record: dict[str, Any]) -> int | None:
    """Cores, where the processes have no GPUs."""
    return record["environment"]["cores"] if record["config"]["device"] == "cpu" else None
