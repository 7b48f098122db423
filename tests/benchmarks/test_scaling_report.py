"""What a run leaves behind, from an invented one: rows, efficiencies, the table's lines and the plots' files."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import Sample
from benchmarks.scaling_exposed import breakdown
from benchmarks.scaling_jobs import Wish, jobs_of, plan
from benchmarks.scaling_measure import Measured, compare
from benchmarks.scaling_plots import heading, parts, write
from benchmarks.scaling_presets import PRESETS
from benchmarks.scaling_record import row_of, series_of
from benchmarks.scaling_report import table
from tpformer.planner.machine import Link

LINK = Link("wire", bandwidth=1e9, latency=0.0, source="invented")
FACTS = {"gemm_backend": "abacus", "peak_flops": None, "backend": "gloo"}
CALL = {"op": "all_reduce", "axis": "tp", "dtype": "float32", "bytes_each": 2_000_000, "calls": 5}
SERIES = plan(
    PRESETS["megatron-2019"], Wish(("tpformer", "dtensor"), ("tp",), (1, 2), ("weak",), projected=(("tp", 8),))
)
JOBS = jobs_of(SERIES)  # tpformer tp 1, 2, 8, then DTensor's


def measured() -> list[Measured]:
    """Of ours each degree; DTensor fails."""
    found = [Measured(job, "has a driver for Llama only" if job.kind == "dtensor" else None, FACTS) for job in JOBS]
    for one, milliseconds in zip(found, (100, 250, 120), strict=False):
        one.loss, one.samples = 10.8, [Sample(milliseconds / 1e3, 0.0)] * 4 + [Sample(9.0, 1.0)]  # the last not quiet
        one.communication = [[] if one.job.degree == 1 else [CALL]] * one.job.processes
        one.peak_bytes = [300 << 20] * one.job.processes
        one.exposed = [breakdown(0.2, {"tp": 0.05}, {"tp": 0.02})]
    return found


def record() -> dict[str, Any]:
    rows = [row_of(one, LINK) for one in measured()]
    return {
        "config": {"preset": "megatron-2019", "threads": 1, "device": "cpu"},
        "environment": {"device": "a machine", "cores": 1},
        "peak_memory_is": "weighed",
        "network": asdict(LINK),
        "jobs": rows,
        "series": series_of(SERIES, JOBS, rows, PRESETS["megatron-2019"].published),
    }


def test_efficiency_is_each_ranks_flops_over_those_of_one_process() -> None:
    found = record()["series"][0]
    flops = [job.flops for job in JOBS[:3]]
    projected = 0.120 + 5 * 2 * 7 / 8 * 2e6 / 1e9  # the link's time added
    by_hand = [1, flops[1] / flops[0] * 0.1 / 0.25 / 2, flops[2] / flops[0] * 0.1 / projected / 8]
    assert found["efficiency"] == pytest.approx(by_hand)
    assert found["published"] == [1.0, 0.95, 0.77]
    assert record()["series"][1]["efficiency"] == [None] * 3


def test_projected_rows_and_no_others_say_so() -> None:
    lines = table(record())
    rows = [line for line in lines if line.startswith("tpformer ")]
    assert ["PROJECTED" in line for line in rows] == [False, False, True]
    assert any(line.startswith("PROJECTED with wire: 1 GB/s") for line in lines)
    assert "PROJECTED" in heading(record())
    assert record()["jobs"][2]["projected"] and record()["jobs"][2]["projection"]["local_ms"] == pytest.approx(120)
    alone = record()
    alone["jobs"][2]["projected"] = False
    assert "PROJECTED" not in heading(alone)


def test_the_table_fits_and_tells_failures_sources_and_crowding() -> None:
    lines = table(record())
    assert max(map(len, lines)) <= 120
    text = "\n".join(lines)
    assert "dtensor tp=2 failed: has a driver for Llama only" in text
    assert "figure 5" in text and "abacus: tpformer" in text
    second = next(line for line in lines if " 2!" in line)  # two processes on one core
    assert second.split()[:6] == ["tpformer", "tp", "weak", "2!", "250.0", "250.0"]
    assert "95.0" in second and "4/5" in second and "25.0" in second
    assert not any(" 8!" in line for line in lines)


def test_a_bar_is_as_long_as_the_step() -> None:
    row = record()["jobs"][1]
    assert parts(row) == pytest.approx({"compute": 187.5, "tp": 37.5, "idle": 25.0})
    assert sum(parts(row).values()) == pytest.approx(row["median_ms"])


def test_plots_are_written(tmp_path: Path) -> None:
    written = write(tmp_path / "scaling_x_cpu", record())
    assert [path.name for path in written] == [f"scaling_x_cpu_{n}.png" for n in ("efficiency", "time", "memory")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert sorted(tmp_path.iterdir()) == sorted(written)


def test_nothing_to_plot_is_no_failure(tmp_path: Path) -> None:
    nothing = record()
    for row in nothing["jobs"]:
        row["error"] = "no"
    assert write(tmp_path / "x", nothing) == []


def test_what_is_projected_with_an_unknown_collective_fails_alone() -> None:
    strange = measured()[2]
    strange.communication = [[CALL | {"op": "broadcast"}]]
    assert "broadcast" in row_of(strange, LINK)["error"]


def same_model() -> list[Measured]:
    """plain and tpformer on one process: one model, one batch."""
    wish = Wish(("tpformer", "plain"), ("tp",), (1,), ("strong",))
    found = [Measured(job) for job in jobs_of(plan(PRESETS["cpu-tiny"], wish))]
    for one in found:
        one.loss, one.first_norm = 5.0, [1.0, 2.0, 2.0]
    return found


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, False),
        ({"loss": 5.00001}, False),
        ({"loss": 5.001}, True),
        ({"loss": float("nan")}, True),
        ({"first_norm": [1.0, 2.0, 2.001]}, True),
        ({"first_norm": None}, False),
    ],
)
def test_another_model_than_plains_is_an_error(change: dict[str, Any], wrong: bool) -> None:
    found = same_model()
    ours, plain = found[0], found[1]
    for name, value in change.items():
        setattr(ours, name, value)
    compare(found)
    assert plain.error is None
    assert (ours.error is not None) == wrong
    if wrong:
        assert str(ours.error).startswith("is not the model of plain tp=1: the loss is off by")


def test_projected_jobs_are_not_compared() -> None:
    found = same_model()
    found[0].job, found[0].loss = replace(found[0].job, projected=True), 99.0
    compare(found)
    assert found[0].error is None
