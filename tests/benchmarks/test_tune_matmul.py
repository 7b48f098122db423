"""Tuning matmuls without a GPU: which tile wins a row, what is raced, and what the table's file becomes."""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import matmul_contenders, tune_matmul
from benchmarks.device_timing import Stopwatch
from benchmarks.kernel_measure import WrongResult
from benchmarks.matmul_shapes import Shape, shapes
from tests.benchmarks.test_tune import measured, pretend_cuda
from tpformer_kernels import matmul_choice, tables
from tpformer_kernels.jit import INTERPRETED

CPU = torch.device("cpu")
SHAPE = Shape("nt gated", 8192, 28672, 4096)
KEY = "nt gated 8192x28672x4096"
EPILOGUES = ("plain", "bias", "residual", "gelu", "gated", "accumulate")
TILES = {
    "small": {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "SLICES": 1, "num_warps": 4, "num_stages": 2},
    "large": {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "SLICES": 4, "num_warps": 4, "num_stages": 2},
}


def race_where(**seconds: float) -> tune_matmul.Race:
    """A race whose results are known."""
    return lambda shape, tiles: (seconds, [])


def test_the_fastest_tile_takes_the_row() -> None:
    verdict = tune_matmul.judge(SHAPE, TILES, race_where(torch=3.0, small=2.5, large=2.0))
    assert (verdict.key, verdict.row) == (KEY, {"tile": "large", "speedup": 1.5})
    assert "1.500 x as fast as torch" in next(tune_matmul.lines(verdict))
    slower = tune_matmul.judge(SHAPE, TILES, race_where(torch=1.0, small=2.0))
    assert slower.row == {"tile": "small", "speedup": 0.5}


def test_where_nothing_runs_nothing_changes() -> None:
    def broken(shape: Shape, tiles: tune_matmul.Tiles) -> Any:
        raise RuntimeError("out of memory")

    for race in (broken, race_where(torch=1.0)):
        verdict = tune_matmul.judge(SHAPE, TILES, race)
        assert verdict.row is None and "nothing could be timed" in next(tune_matmul.lines(verdict))
        table = {"measured": measured("H200"), "shapes": {KEY: {"tile": "small", "speedup": 2.0}}}
        assert tune_matmul.updated(table, [verdict], measured("H200"))["shapes"] == table["shapes"]


def test_rows_of_another_device_or_version_are_unmeasured_again() -> None:
    table = {"measured": measured("H200"), "shapes": {"other": {"tile": "small", "speedup": 2.0}}}
    verdict = tune_matmul.judge(SHAPE, TILES, race_where(torch=3.0, large=2.0))
    same = tune_matmul.updated(table, [verdict], measured("H200"))
    assert same["shapes"] == {"other": {"tile": "small", "speedup": 2.0}, KEY: {"tile": "large", "speedup": 1.5}}
    for where in (measured("H100"), measured("H200", "2.12")):
        assert tune_matmul.updated(table, [verdict], where)["shapes"]["other"]["speedup"] is None
    assert tune_matmul.updated({**table, "measured": None}, [verdict], measured("H200"))["shapes"]["other"] == {
        "tile": "small",
        "speedup": None,
    }


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("layout", ["nn", "nt", "tn"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_every_kind_is_checked_against_torch(epilogue: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(f"{layout} {epilogue}", 20, 34, 18)
    x = matmul_contenders.operands(shape, torch.float32, CPU)
    assert matmul_choice.kind_of(x.a, x.b, epilogue) == shape.kind
    before = x.total.clone()
    with matmul_contenders.launched_in("small", TILES["small"]):
        matmul_contenders.check(shape, x)
        assert torch.equal(x.total, before)
        by_torch = matmul_contenders.by_torch

        def of_others(shape: Shape, x: matmul_contenders.Operands) -> matmul_contenders.Run:
            others = [t.flip(0) for t in (x.a, x.b, x.bias, x.residual, x.total)]
            return by_torch(shape, replace(x, a=others[0], bias=others[2], residual=others[3]))

        monkeypatch.setattr(matmul_contenders, "by_torch", of_others)  # negative control
        with pytest.raises(WrongResult):
            matmul_contenders.check(shape, x)


def test_all_kinds_have_contenders() -> None:
    assert {shape.kind.split()[1] for shape in shapes()} == set(EPILOGUES)


def test_the_race_checks_every_tile_and_runs_a_final(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed by a stub that looks up what would be launched at the moment of each sample."""
    asked: list[str] = []

    def sample() -> float:
        choice = matmul_contenders.matmul_ops.choose("nt plain", 4, 4, 4, torch.bfloat16, CPU)
        asked.append(choice.tile)
        return float(choice.options.get("seconds", 9))

    def check(shape: Shape, x: Any) -> None:
        if matmul_contenders.matmul_ops.choose("nt plain", 4, 4, 4, torch.bfloat16, CPU).tile == "wrong":
            raise WrongResult("output 0 is off")

    monkeypatch.setattr(tune_matmul, "check", check)
    monkeypatch.setattr(tune_matmul, "stopwatch", lambda work, device: Stopwatch(sample, "stub"))
    tiles = {"slow": {"seconds": 4}, "wrong": {"seconds": 1}, "good": {"seconds": 2}, "fair": {"seconds": 3}}
    seconds, failures = tune_matmul.race_on(CPU, Shape("nt plain", 4, 4, 4), tiles)
    assert seconds == {"torch": 9.0, "good": 2.0, "fair": 3.0}
    assert failures == ["wrong: WrongResult: output 0 is off"]
    assert asked.count("slow") == 3 and asked.count("good") == 3 + tune_matmul.ROUNDS and "wrong" not in asked


@pytest.mark.parametrize("architecture", tables.ARCHITECTURES)
def test_the_tables_are_as_they_are_derived(architecture: int, tmp_path: Path) -> None:
    tune_matmul.write_table(tmp_path / "table.json", tune_matmul.derived(architecture))
    committed = (tune_matmul.TABLES / f"matmul_sm_{architecture}.json").read_text()
    assert (tmp_path / "table.json").read_text() == committed


def test_derived_rows_leave_measured_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    read = matmul_choice.table(90)
    measured_row = {"tile": "64x64x64", "speedup": 1.1}
    shapes_now = read["shapes"] | {KEY: measured_row, "nt plain 1x1x1": measured_row}
    monkeypatch.setattr(matmul_choice, "table", lambda architecture: read | {"shapes": shapes_now})
    rows = tune_matmul.derived(90)["shapes"]
    assert rows[KEY] == measured_row
    assert "nt plain 1x1x1" not in rows and len(rows) == len(read["shapes"])


def test_without_a_gpu_it_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune_matmul.main([])
    assert "no CUDA device" in capsys.readouterr().err
    pretend_cuda(monkeypatch, (8, 6))
    with pytest.raises(SystemExit):
        tune_matmul.parsed(["--write"])
    assert "sm_86" in capsys.readouterr().err


@pytest.mark.parametrize("write", [True, False])
def test_the_script_writes_only_if_asked(
    write: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_cuda(monkeypatch, (9, 0))
    path = tmp_path / "matmul_sm_90.json"
    shutil.copy(tune_matmul.TABLES / path.name, path)
    before = path.read_text()
    monkeypatch.setattr(tune_matmul, "TABLES", tmp_path)
    monkeypatch.setattr(tune_matmul, "own_stream", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(tune_matmul, "environment", lambda module, device: measured("H200"))
    race = race_where(**{"torch": 3.0, "128x256x64": 2.0})
    monkeypatch.setattr(tune_matmul, "race_on", lambda device, *place: race(*place))
    monkeypatch.setattr(tables, "architecture_of", lambda device: 90)
    tune_matmul.main(["--models", "llama3-8b", "--tokens", "8192", *(["--write"] if write else [])])
    assert f"{KEY}  " in capsys.readouterr().out
    if not write:
        assert path.read_text() == before
        return
    after = json.loads(path.read_text())
    assert after["shapes"][KEY] == {"tile": "128x256x64", "speedup": 1.5}
    assert after["measured"]["device"] == "H200"
    assert after["shapes"]["nt gated 4096x28672x4096"]["speedup"] is None
    assert after["shapes"].keys() == json.loads(before)["shapes"].keys()
