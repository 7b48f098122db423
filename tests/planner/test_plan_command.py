"""`tpformer plan` in a process of its own, and the pieces it prints."""

import re
from pathlib import Path

import pytest

import tpformer
from tpformer.__main__ import main
from tpformer.planner.command import count
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


@pytest.mark.parametrize(("text", "number"), [("4096", 4096), ("8K", 8192), ("4M", 2**22), ("1.5m", 3 * 2**19)])
def test_counts(text: str, number: int) -> None:
    assert count(text) == number


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus (0) must be at least 1"),
        (["--device", "h300"], "device ('h300') must be one of"),
        (["--network", "token-ring"], "link ('token-ring') must be one of"),
        (["--model", "llama-9b"], "model 'llama-9b' is not known"),
        (["--explain", "100000"], "--explain (100000) must be 1 to"),
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
