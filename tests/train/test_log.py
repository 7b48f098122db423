"""metrics.jsonl survives whatever a killed writer left, and the plot is a picture."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tpformer.train.log import MetricsFile, peak_flops, plot_loss


def lines(*steps: int) -> str:
    """The text of one record a step."""
    return "".join(json.dumps({"step": step, "loss": step / 7}) + "\n" for step in steps)


def test_records_are_appended_and_read_back(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    assert file.read() == []
    records: list[dict[str, Any]] = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 1, "validation_loss": 1e-300}]
    for record in records:
        file.write(record)
    assert file.read() == records
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize("left", ["", '{"step": 5, "lo', "{", "5\n", "[]\n", '{"loss": 1}\n', "\n", "null\n"])
def test_resuming_drops_later_steps_and_what_is_no_record(left: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2, 3, 4, 5) + left)
    file = MetricsFile(path, 3)
    file.write({"step": 4, "loss": 4 / 7})
    assert path.read_text() == lines(1, 2, 3, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_begins_with_no_records(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2))
    assert MetricsFile(path, 0).read() == []


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    """With both curves, with one, and with none; a wider curve gives another picture."""
    path = tmp_path / "loss.png"
    records = [{"step": step, "loss": 5 / step} for step in range(1, 9)]
    pictures = []
    for shown in (records, [*records, {"step": 8, "validation_loss": 1.0}], []):
        plot_loss(path, shown, {"ln(vocabulary)": 5.55, "unigram entropy": 3.2})
        pictures.append(path.read_bytes())
        assert pictures[-1].startswith(b"\x89PNG\r\n\x1a\n")
        assert pictures[-1].endswith(b"IEND\xaeB`\x82")
    assert len(set(pictures)) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("GeForce", None)]
)
def test_peaks_are_those_of_the_data_sheets(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
