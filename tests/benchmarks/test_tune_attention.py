"""The comparison by which `auto` chooses an attention: which shapes, what is kept, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernel_measure, tune_attention
from tpformer_kernels.attention_choice import Heads, measurements

TINY = Heads(16, 4, 2, 32)
HERE = {"device": "H200", "torch": "2.11", "triton": "3.6", "date": "today"}


def test_both_are_checked_and_timed_on_the_device() -> None:
    """On a CPU both are torch's, of which neither is twenty times as fast."""
    found = tune_attention.race_on(torch.device("cpu"), TINY)
    assert isinstance(found, float)
    assert 0.05 < found < 20


def test_what_differs_from_run_to_run_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    once = kernel_measure.Contender._run_once
    noise = iter(range(100))  # of the last time of three
    monkeypatch.setattr(
        kernel_measure.Contender, "_run_once", lambda self: tuple(x + next(noise) // 8 for x in once(self))
    )
    found = tune_attention.race_on(torch.device("cpu"), TINY)
    assert isinstance(found, str)
    assert "other numbers when it is run again" in found


def test_what_was_found_is_kept_and_the_rest_has_rows(tmp_path: Path) -> None:
    first, second, *_ = tune_attention.shapes()
    empty: dict[str, Any] = {"architecture": 90, "measured": None, "speedups": {}}
    table = tune_attention.updated(empty, {}, None)
    assert list(table["speedups"]) == [str(shape) for shape in tune_attention.shapes()]
    assert set(table["speedups"].values()) == {None}
    table = tune_attention.updated(table, {first: 1.25}, HERE)
    table = tune_attention.updated(table, {second: 0.5}, HERE | {"date": "tomorrow"})
    assert (table["speedups"][str(first)], table["speedups"][str(second)]) == (1.25, 0.5)
    assert table["measured"]["date"] == "tomorrow"
    other = tune_attention.updated(table, {second: 0.75}, HERE | {"triton": "3.9"})
    assert (other["speedups"][str(first)], other["speedups"][str(second)]) == (None, 0.75)
    tune_attention.write_table(tmp_path / "table.json", table)
    assert json.loads((tmp_path / "table.json").read_text()) == table


def test_deriving_keeps_what_is_measured() -> None:
    table = measurements(90)
    assert tune_attention.updated(table, {}, None) == table


def test_a_failure_is_told_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = list(tune_attention.shapes())
    found: dict[Heads, float] = {}
    for _ in tune_attention.compared(lambda shape: "no memory" if shape == shapes[0] else 1.5, found):
        pass
    assert found == dict.fromkeys(shapes[1:], 1.5)
    assert "failed: no memory" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune_attention.main([])
    assert "no CUDA device" in capsys.readouterr().err
