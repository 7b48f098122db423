"""What a run of benchmarks.scaling leaves behind as plain values: a row a job, and the efficiencies of each series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.harness import Timing
from benchmarks.scaling_jobs import Job, Series
from benchmarks.scaling_measure import Measured
from benchmarks.scaling_presets import Published
from benchmarks.scaling_projection import project
from tpformer.planner.machine import Link


def row_of(measured: Measured, link: Link | None) -> dict[str, Any]:
    """One job; what was projected is completed by the link's time."""
    job = measured.job
    row: dict[str, Any] = {
        "kind": job.kind,
        "axis": job.axis,
        "degree": job.degree,
        "projected": job.projected,
        "family": type(job.model).__name__.removesuffix("Config").removeprefix("Plain"),
        "model": asdict(job.model),
        "parameters": job.sizes().num_parameters(),
        "batch": job.batch,
        "micro_batch": job.micro,
        "dtype": job.dtype,
        "tokens": job.tokens,
        "flops": job.flops,
        "error": measured.error,
    }
    if measured.error is not None:
        return row
    row |= asdict(Timing.of(measured.samples)) | measured.facts
    row |= {
        "loss": None if job.projected else measured.loss,  # a projected one's is of no sense
        "communication": measured.communication,
        "peak_memory_bytes": measured.peak_bytes,
        "exposed": measured.exposure(),
        "samples": [asdict(sample) for sample in measured.samples],
    }
    if job.projected:
        assert link is not None
        try:
            row = project(row, link)
        except ValueError as error:
            return row | {"error": str(error)}
    return row | rates(row)


def rates(row: dict[str, Any]) -> dict[str, Any]:
    """What follows from a row's time."""
    step = row["median_ms"] / 1e3
    flops = row["flops"] / step / row["degree"]
    peak = row["peak_flops"]
    return {
        "tokens_per_second": row["tokens"] / step,
        "flops_per_second_per_rank": flops,
        "mfu": flops / peak if peak else None,
    }


def efficiency(row: dict[str, Any], base: dict[str, Any]) -> float | None:
    """FLOP/s of each rank over those of the one process; with the same model and batch that is t1 / (n tn).

    The definition of arXiv 1909.08053, section 5.1. None where one of the two failed.
    """
    if row["error"] is not None or base["error"] is not None:
        return None
    return row["flops_per_second_per_rank"] / base["flops_per_second_per_rank"]


def series_of(
    series: Sequence[Series], jobs: list[Job], rows: list[dict[str, Any]], published: Sequence[Published]
) -> list[dict[str, Any]]:
    """Every series with its jobs' numbers in the record, efficiencies beside them, and what others published.

    efficiency is against the kind's own process, efficiency_to_plain against plain PyTorch's where that was measured.
    """
    found = []
    for line in series:
        numbers = [jobs.index(job) for job in line.jobs]
        own = rows[numbers[0]] if line.jobs[0].degree == 1 else None
        base = own or (rows[numbers[0]] if line.mode == "strong" else None)  # which has the one process's model
        plain = next((row for row in rows if base and row["kind"] == "plain" and row["model"] == base["model"]), None)
        known = next((p for p in published if (p.axis, p.mode) == (line.axis, line.mode)), None)
        mine = [rows[number] for number in numbers]
        found.append(
            {
                "kind": line.kind,
                "axis": line.axis,
                "mode": line.mode,
                "degrees": [job.degree for job in line.jobs],
                "jobs": numbers,
                "efficiency": [None if own is None else efficiency(row, own) for row in mine],
                "efficiency_to_plain": [None if plain is None else efficiency(row, plain) for row in mine],
                "published": None if known is None else [known.efficiency.get(job.degree) for job in line.jobs],
                "published_source": None if known is None else known.source,
            }
        )
    return found
