"""`tpformer plan` in a process of its own, and the pieces it prints."""

import re
from pathlib import Path

import pytest

import tpformer
from tpformer.__main__ import main
from tpformer.planner import command
from tpformer.planner.command import count
from tpformer.planner.hardware import device
from tpformer.planner.report import explain, sent_bytes, table

ASKED = ["plan", "--model", "llama-70b", "--gpus", "512", "--device", "h100-sxm", "--tokens-per-step", "4M"]


def test_it_prints_the_best_layouts_and_how_to_run_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--best", "5"]) == 0
    out = capsys.readouterr().out
    assert "PREDICTED, not measured: 70.55B parameters on 512 x h100-sxm" in out
    assert "512 samples of 8192 = 4,194,304 tokens a step" in out
    assert re.search(r"^  torchrun --nproc-per-node 8 --nnodes 64 .* examples/pretrain.py --tp", out, re.MULTILINE)
    lines = out.splitlines()
    assert max(len(line) for line in lines if "torchrun" not in line) <= 120
    assert sum(bool(re.match(r" +\d+ +\d", line)) for line in lines) == 10  # five of time, five of memory


def test_explained_terms_multiply_to_what_is_printed() -> None:
    """Every line's product is its milliseconds, and they add up to the step."""
    found = tpformer.plan("llama-70b", 64, "h100-sxm", 2**20)[0]
    text = explain(found)
    total = 0.0
    for milliseconds, formula in re.findall(r"^ +\w+ +([\d.]+) ms  .* = (.*)$", text, re.MULTILINE):
        product = 1.0
        for factor in formula.split(" x "):
            product *= float(factor.split()[-1])
        assert 1e3 * product == pytest.approx(float(milliseconds), rel=2e-3, abs=2e-3)
        total += float(milliseconds)
    printed = re.search(r"^ +step +([\d.]+) ms", text, re.MULTILINE)
    assert printed is not None
    assert total == pytest.approx(float(printed[1]), rel=1e-3)
    assert 1e3 * found.seconds == pytest.approx(float(printed[1]), rel=1e-3)


def test_the_picture_is_a_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of plans with a pipeline and of plans without."""
    for gpus in ("8", "512"):
        path = tmp_path / f"{gpus}.png"
        model = "llama-8b" if gpus == "8" else "llama-70b"
        assert main(["plan", "--model", model, "--gpus", gpus, "--best", "4", "--plot", str(path)]) == 0
        assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "512.png", tmp_path / "8.png"]


def test_what_is_sent_is_the_traffics_sum() -> None:
    found = tpformer.plan("llama-70b", 64, "h100-sxm", 2**20)[0]
    sums = [sent_bytes(found, axis) for axis in ("tp", "pp", "dp")]
    assert sum(sums) == sum(item.bytes * item.calls for item in found.traffic)
    assert table([found]).count("tp") >= 1


MINE = """
import torch
from torch import nn


def build():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), torch.zeros(32, 64)


def build_nothing():
    return None


def build_wrongly():
    raise RuntimeError("no data")
"""


def test_a_users_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gradients of 9,610 numbers in fp32, summed by 8 replicas in each of 300 steps."""
    (tmp_path / "mine.py").write_text(MINE)
    place = f"{tmp_path}/mine.py:build"
    assert main(["plan", "--module", place, "--traffic", "--gpus", "8", "--batches", "100", "--epochs", "3"]) == 0
    out = capsys.readouterr().out
    assert "9,610  37.54 KiB" in out and "A run of 3 x 100 steps" in out
    assert re.search(r"^dp +8 +1 +100 +300 ", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere.py:build", "must be FILE.py:FUNCTION, and the file must be there"),
        ("mine.py", "must be FILE.py:FUNCTION"),
        ("mine.py:build_it", "AttributeError"),
        ("mine.py:build_nothing", "must return a module and its example inputs, not NoneType"),
        ("mine.py:build_wrongly", "RuntimeError: no data"),
    ],
)
def test_what_is_no_module(
    place: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    assert main(["plan", "--module", place, "--traffic"]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_the_traffic_of_a_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--traffic", "2", "--batches", "1000"]) == 0
    out = capsys.readouterr().out
    assert "Collectives of one step" in out and "A run of 1 x 1,000 steps" in out
    assert max(map(len, out.splitlines())) <= 120


def test_a_calibration_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole or not at all; `calibrate` itself is tested by itself."""
    monkeypatch.setattr(command, "calibrate", lambda seconds: device("cpu"))
    path = tmp_path / "machine.json"
    assert main(["calibrate", str(path)]) == 0
    assert "tpformer plan --device" in capsys.readouterr().out
    assert device(str(path)) == device("cpu")
    assert [file.name for file in tmp_path.iterdir()] == ["machine.json"]
    assert main(["calibrate", str(tmp_path / "machine.toml")]) == 1
    assert "must end in .json" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "number"), [("4096", 4096), ("8K", 8192), ("4M", 2**22), ("1.5m", 3 * 2**19)])
def test_counts(text: str, number: int) -> None:
    assert count(text) == number


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus (0) must be at least 1"),
        (["--memory-only", "--tp", "0"], "--tp (0) must be at least 1"),
        (["--memory-only", "--tp", "3", "--gpus", "9"], "num_heads (32) must be divisible by tp (3)"),
        (["--traffic", "--batches", "-3"], "--batches (-3) must be at least 1"),
        (["--model", "gpt2", "--seq", "4096"], "seq_len (4096) must be at most max_seq_len (1024)"),
        (["--seq", "0"], "seq_len (0) must be at least 1"),
        (["--memory-only", "--plot", "x.png"], "--plot is of predicted layouts"),
        (["--device", "h300"], "device ('h300') must be one of"),
        (["--network", "token-ring"], "link ('token-ring') must be one of"),
        (["--model", "llama-9b"], "model 'llama-9b' is not known"),
        (["--explain", "100000"], "--explain or --traffic (100000) must be 1 to"),
        (["--explain", "0"], "--explain or --traffic (0) must be 1 to"),
        (["--model", "llama-405b", "--gpus", "4"], "nothing fits on 4 x h100-sxm"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("tpformer plan: ") and message in captured.err
    assert captured.err.count("\n") == 1


def test_the_hardware_is_listed_with_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--list-hardware"]) == 0
    out = capsys.readouterr().out
    for name in (
        "v100",
        "a100-sxm",
        "h100-sxm",
        "h200",
        "b200",
        "gb200",
        "mi300x",
        "cpu",
        "nvlink4",
        "pcie5",
        "ib-400",
    ):
        assert name in out
    assert "sources" in out
