"""Predicted beside published and measured: what counts as close, what order means, and how near the planner is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks import harness, planner, planner_published, planner_steps
from benchmarks.planner import Measured, order, predict, table
from benchmarks.planner_layouts import MODEL, Case, cases
from benchmarks.planner_picture import plot, points
from benchmarks.planner_steps import step_of
from tests.distributed import Ranks
from tpformer import ParallelConfig
from tpformer.planner.hardware import device

DENSE = ("2020", "SC21", "SC21 table 2", "2022 full", "2022 present", "H100")
"""Tables of Megatron's dense models on V100, A100 and H100."""


@pytest.fixture(scope="module")
def published() -> list[planner_published.Compared]:
    return planner_published.compare()


def test_dense_rows_are_within_fifteen_percent(published: list[planner_published.Compared]) -> None:
    """All but the smallest H100 model's, and the software of 2019."""
    missed = [one.row.name for one in published if one.row.table in DENSE and not one.close]
    assert missed == ["1.7B tp1 pp1 dp48"]
    assert sum(one.row.table in DENSE for one in published) > 40


def test_what_is_missed_is_said(published: list[planner_published.Compared]) -> None:
    """Every table with a row that is not close has a reason, and the table of the terminal shows both."""
    text = planner_published.table(published)
    for one in published:
        if not one.close:
            assert one.row.table in planner_published.WHY, one.row.table
    assert sum(line.endswith("  missed") for line in text.splitlines()) == sum(not one.close for one in published)
    assert max(map(len, text.splitlines())) <= 120


def measured(processes: int, seconds: float, predicted: float) -> Measured:
    """A layout measured to take so long, and predicted to take so long."""
    case = Case(ParallelConfig(tp=processes, dp=1), 8)
    plan: Any = type("Plan", (), {"seconds": predicted})()
    return Measured(case, plan, harness.Timing.of([harness.Sample(seconds, 0.0)]))


def test_order_counts_pairs_that_are_clearly_apart() -> None:
    """1.0 and 1.05 have none; 1.0 and 2.0 agree; 2.0 and 3.0 are predicted the other way round."""
    found = [measured(2, 1.0, 1.0), measured(2, 1.05, 0.9), measured(2, 2.0, 4.0), measured(2, 3.0, 3.0)]
    assert order(found) == (4, 5)
    assert order([measured(1, 1.0, 2.0), measured(2, 2.0, 1.0)]) == (0, 0)  # on other numbers of processes
    assert "order: 4 of 5 pairs" in table(found)
    assert "missed" in table([measured(2, 1.0, 1.3)]) and "missed" not in table([measured(2, 1.0, 1.1)])


def test_the_picture_of_both(tmp_path: Path, published: list[planner_published.Compared]) -> None:
    comparison = {"rows": planner_published.record(published)}
    plot(tmp_path / "published.png", comparison)
    assert sum(map(len, points(comparison)[1].values())) == len(published)
    layout = {"processes": 2, "measured": {"median_ms": 1000.0}, "predicted_ms": 900.0}
    assert points({"layouts": [layout]}) == ("measured", {"2 processes": [(1.0, 0.9)]}, 0.20)
    plot(tmp_path / "measured.png", {"layouts": [layout]})
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def losses_of_two_processes() -> dict[str, list[float]]:
    """On a rank: two steps of every layout on two processes, of a smaller model."""
    with patch.object(planner_steps, "MODEL", replace(MODEL, vocab_size=256, hidden_size=64, ffn_hidden_size=96)):
        return {case.name: [step() for _ in range(2)] for case in cases(2) for step in [step_of(case)]}


def test_the_layouts_are_one_model(ranks: Ranks) -> None:
    """Whose steps take the same way, whatever the layout: it is time alone that differs."""
    for found in ranks(losses_of_two_processes, 2):
        first = found[cases(2)[0].name]
        assert first[1] < first[0]
        for losses in found.values():
            assert losses == pytest.approx(first, rel=1e-5)


def test_every_layout_has_a_prediction() -> None:
    names = []
    for processes in (1, 2, 4):
        for case in cases(processes):
            assert case.processes == processes
            assert 0.01 < predict(case, device("cpu")).seconds < 100
            names.append(case.name)
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="there are layouts on 1, 2, 4 processes, not on 3"):
        cases(3)


def test_the_record_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planner.main(["--published", "--output", str(tmp_path / "record.json")])
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["schema_version"] == 1
    assert {"table", "run", "published_seconds", "predicted_seconds", "ratio"} <= record["rows"][0].keys()
    assert "within 15%" in capsys.readouterr().out
