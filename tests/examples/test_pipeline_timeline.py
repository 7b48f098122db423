"""examples/pipeline_timeline.py measures its three steps, prints them once and draws them."""

import contextlib
import dataclasses
import io
import re
from pathlib import Path
from unittest import mock

import pytest

from examples import pipeline_timeline as example
from tests.distributed import Ranks


def run(output: str) -> str:
    """On a rank: what the example prints, of a model that takes no time."""
    printed = io.StringIO()
    small = dataclasses.replace(example.MODEL, hidden_size=32, num_layers=3)
    patched = mock.patch.multiple(example, MODEL=small, STEPS=1)
    with patched, contextlib.redirect_stdout(printed):
        example.main(["--device", "cpu", "--output", output])
    return printed.getvalue()


def test_three_steps_are_measured_and_drawn(ranks: Ranks, tmp_path: Path) -> None:
    """Every rank and stage has its line; the theory is 2/3, 2/5 and 2/11, and some time is idle."""
    first, *others = ranks(run, 3, str(tmp_path / "out.png"))
    assert others == ["", ""]
    assert re.findall(r"gpipe, p = 3, m = (\d):", first) == ["1", "3", "9"]
    found = re.findall(r"idle ([\d.]+)% measured, ([\d.]+)% in theory", first)
    assert [theory for _, theory in found] == ["66.7", "40.0", "18.2"]
    assert all(0 < float(measured) < 100 for measured, _ in found)
    assert re.findall(r"^ +(\d) +(\d) ", first, re.MULTILINE) == [("0", "0"), ("1", "1"), ("2", "2")] * 3
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_one_process_is_told_to_be_three(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match=r"error: .* needs 3 processes, but 1 is running"):
        example.main(["--device", "cpu"])
