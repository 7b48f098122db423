"""Tuning without a GPU: which candidates there are, who wins, what is launched, and what the table's file becomes."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import tune
from benchmarks.device_timing import Stopwatch
from benchmarks.kernel_cases import TINY, Case, gated_case
from benchmarks.kernel_providers import OURS, Provider
from benchmarks.tune_cases import TUNED, Options, candidates, work_of
from tpformer_kernels import gated_activation, library, tables
from tpformer_kernels.jit import triton

CPU = torch.device("cpu")
ROWS: list[dict[str, Any]] = [{"up_to": 256, "BLOCK": 1, "num_warps": 4}, {"up_to": None, "BLOCK": 2, "num_warps": 4}]


@pytest.mark.parametrize("architecture", tables.ARCHITECTURES)
def test_a_table_is_written_as_it_is_committed(architecture: int, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    tune.write_table(path, tables.table(architecture))
    assert path.read_text() == (tune.TABLES / f"sm_{architecture}.json").read_text()


@pytest.mark.parametrize("architecture", tables.ARCHITECTURES)
def test_every_row_of_every_table_has_candidates(architecture: int) -> None:
    kernels = tables.table(architecture)["kernels"]
    assert kernels.keys() == TUNED.keys()
    for key, rows in kernels.items():
        for row, size in zip(rows, tune.sizes_of(key, rows), strict=True):
            committed = {name: value for name, value in row.items() if name != "up_to"}
            found = list(candidates(key, size, committed, multiprocessors=132))
            assert found[0] == committed
            assert 4 < len(found) < 64
            assert all(one.keys() == committed.keys() for one in found)
            assert len({tuple(one.items()) for one in found}) == len(found)
            # the size is one that this row serves, and the case asks the table for it
            assert next(r for r in rows if r["up_to"] is None or size <= r["up_to"]) is row
            assert [provider.name for provider in work_of(key, size).providers] == [OURS]


def test_programs_are_for_the_device() -> None:
    committed = {"BLOCK_ROWS": 1, "PROGRAMS": 7, "num_warps": 8}
    found = list(candidates("norm_backward", 4096, committed, multiprocessors=100))
    assert {one["PROGRAMS"] for one in found[1:]} == {100, 200, 400, 800}
    assert all(one["BLOCK_ROWS"] * 4096 / (32 * one["num_warps"]) <= 32 for one in found[1:])


def test_rows_must_ascend() -> None:
    assert tune.sizes_of("dropout_add", ROWS) == [256, TUNED["dropout_add"].last]
    with pytest.raises(ValueError, match="ascend"):
        tune.sizes_of("dropout_add", [{"up_to": 1 << 20}, {"up_to": None}])
    with pytest.raises(ValueError, match="ascend"):
        tune.sizes_of("dropout_add", [{"up_to": 512}, {"up_to": 256}, {"up_to": None}])


def race_where(seconds: Callable[[Options], float | str]) -> tune.Race:
    """A race whose results are known."""
    return lambda key, size, options: [seconds(one) for one in options]


def verdicts_where(seconds: Callable[[Options], float | str]) -> list[tune.Verdict]:
    return tune.tune("dropout_add", ROWS, 132, race_where(seconds))


def test_a_clear_winner_takes_the_row() -> None:
    first, last = verdicts_where(lambda one: 1.0 if one["BLOCK"] == 2048 and one["num_warps"] == 8 else 1.1)
    assert first.row == {"up_to": 256, "BLOCK": 2048, "num_warps": 8}
    assert last.row == {"up_to": None, "BLOCK": 2048, "num_warps": 8}
    assert first.margin == pytest.approx(1.1)
    (line,) = tune.lines(first)
    assert "1.100 x as fast" in line and "'BLOCK': 2048" in line


@pytest.mark.parametrize("margin", [1.0, 1.019])
def test_noise_takes_no_row(margin: float) -> None:
    found = verdicts_where(lambda one: 1.0 if one["BLOCK"] == 2048 else margin)
    assert [verdict.row for verdict in found] == ROWS
    assert "stays" in next(tune.lines(found[0]))


def test_options_that_cannot_run_lose() -> None:
    (first, _) = verdicts_where(lambda one: "OutOfResources: shared memory" if one["BLOCK"] < 4096 else 5.0)
    assert first.row["BLOCK"] == 4096
    assert any("OutOfResources" in line for line in tune.lines(first))


def test_where_nothing_runs_nothing_changes() -> None:
    found = verdicts_where(lambda one: "broken")
    assert [verdict.row for verdict in found] == ROWS
    assert "nothing could be timed" in next(tune.lines(found[0]))


def measured(device: str, torch_version: str = "2.11") -> dict[str, Any]:
    return {"device": device, "torch": torch_version, "triton": "3.6", "command": "python", "date": "today"}


def test_the_table_remembers_what_was_measured() -> None:
    table = {"architecture": 90, "measured": None, "kernels": {"rope": [{"up_to": None}], "dropout_add": ROWS}}
    found = list(reversed(verdicts_where(lambda one: 1.0 if one["BLOCK"] == 4096 else 2.0)))
    once = tune.updated(table, found, measured("H200"))
    assert [row["up_to"] for row in once["kernels"]["dropout_add"]] == [256, None]
    assert {row["BLOCK"] for row in once["kernels"]["dropout_add"]} == {4096}
    assert list(once["kernels"]) == ["rope", "dropout_add"] and once["kernels"]["rope"] == [{"up_to": None}]
    assert once["measured"] == {**measured("H200"), "kernels": ["dropout_add"]}
    assert table["measured"] is None
    rope = [replace(found[0], key="rope")]
    assert tune.updated(once, rope, measured("H200"))["measured"]["kernels"] == ["dropout_add", "rope"]
    assert tune.updated(once, rope, measured("H200", "2.12"))["measured"]["kernels"] == ["rope"]


def test_a_write_that_fails_leaves_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sm_90.json"
    path.write_text("as it was")

    def full(*paths: Path) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        tune.write_table(path, tables.table(90))
    assert path.read_text() == "as it was"


@pytest.mark.skipif(triton is None, reason="needs Triton")
def test_a_candidate_is_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []
    monkeypatch.setattr(library, "INTERPRETED", True)
    monkeypatch.setattr(
        "tpformer_kernels.gated.launch", lambda kernel, *arguments, **options: launched.append(options["BLOCK"])
    )
    monkeypatch.setattr("tpformer_kernels.backend.INTERPRETED", True)
    pairs = torch.zeros(2, 8)
    committed = tables.options("gated_forward", 8, CPU)
    with tune.launched_with("gated_forward", {"BLOCK": 64, "num_warps": 1}, CPU):
        gated_activation(pairs, "silu", backend="triton")
    gated_activation(pairs, "silu", backend="triton")
    assert launched == [64, committed["BLOCK"]]


def test_tables_that_do_not_listen_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "options", lambda kernel, size, device: {"BLOCK": 1})
    with (
        pytest.raises(RuntimeError, match="nothing would be tuned"),
        tune.launched_with("gated_forward", {"BLOCK": 64}, CPU),
    ):
        pass


def tiny(key: str, size: int) -> Case:
    """A case for a CPU whose op is wrong with one of the candidates."""
    case = gated_case("gated_activation", TINY[0], torch.float32)
    provider = case.providers[0]

    def run(pairs: torch.Tensor) -> Any:
        wrong = tables.options("gated_forward", 1, CPU)["BLOCK"] == 512
        return gated_activation(pairs, "silu") * (2 if wrong else 1)

    return replace(case, providers=(Provider(OURS, run, provider.reference, 1),))


def test_the_race_checks_every_candidate_and_runs_a_final(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed by a stub that looks up what would be launched at the moment of each sample."""
    asked: list[int] = []

    def sample() -> float:
        asked.append(tables.options("gated_forward", 1, CPU)["BLOCK"])
        return 1.0 / asked[-1]

    monkeypatch.setattr(tune, "work_of", tiny)
    monkeypatch.setattr(tune, "stopwatch", lambda work, device: Stopwatch(sample, "stub"))
    options = [{"BLOCK": block, "num_warps": 4} for block in (1024, 512, 64, 2048, 4096, 8192)]
    results = tune.race_on(CPU, "gated_forward", 1, options)
    assert isinstance(results[1], str) and "WrongResult: output 0" in results[1]
    assert 512 not in asked
    assert [results[i] for i in (0, 3, 4, 5)] == [1 / 1024, 1 / 2048, 1 / 4096, 1 / 8192]
    assert results[2] == float("inf")  # too slow for the final
    assert tune.ranked(results)[0] == 5
    in_the_final = asked[3 * 5 :]
    assert in_the_final.count(1024) == in_the_final.count(8192) == tune.ROUNDS


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_without_a_gpu_it_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main([])
    assert "no CUDA device" in capsys.readouterr().err


def test_another_architectures_table_is_not_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_cuda(monkeypatch, (8, 6))
    tune.parsed([])
    with pytest.raises(SystemExit):
        tune.parsed(["--write"])
    assert "sm_86" in capsys.readouterr().err


@pytest.mark.parametrize("write", [True, False])
def test_the_script_writes_only_if_asked(
    write: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_cuda(monkeypatch, (9, 0))
    shutil.copy(tune.TABLES / "sm_90.json", tmp_path)
    before = (tmp_path / "sm_90.json").read_text()
    monkeypatch.setattr(tune, "TABLES", tmp_path)
    monkeypatch.setattr(tune, "own_stream", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(tune, "environment", lambda module, device: measured("H200"))
    race = race_where(lambda one: 1.0 if one == {"BLOCK_HEADS": 16, "num_warps": 2} else 1.5)
    monkeypatch.setattr(tune, "race_on", lambda device, *place: race(*place))
    monkeypatch.setattr(tables, "architecture_of", lambda device: 90)
    tune.main(["--kernels", "rope", *(["--write"] if write else [])])
    assert "1.500 x as fast" in capsys.readouterr().out
    after = (tmp_path / "sm_90.json").read_text()
    if not write:
        assert after == before
        return
    table = json.loads(after)
    assert table["kernels"]["rope"] == [{"up_to": None, "BLOCK_HEADS": 16, "num_warps": 2}]
    assert table["measured"]["device"] == "H200" and table["measured"]["kernels"] == ["rope"]
    changed = [line for line in after.splitlines() if line not in before.splitlines()]
    assert len(changed) == 2  # "measured", and the row
    assert [path.name for path in tmp_path.iterdir()] == ["sm_90.json"]
