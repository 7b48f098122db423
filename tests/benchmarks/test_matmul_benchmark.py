"""The matmul benchmark on a CPU: its promises, and the whole script, interpreted at tiny sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import matmul
from benchmarks.matmul_shapes import Shape
from tpformer_kernels.jit import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED or torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1")


@interpreted
def test_the_whole_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert matmul.main(["--device", "cpu", "--rounds", "2", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "matmul_cpu.json").read_text())
    assert [Shape(*(row[name] for name in Shape._fields)) for row in record["rows"]] == list(matmul.TINY)
    for row in record["rows"]:
        assert row["ratio"] == pytest.approx(row["torch"]["median_ms"] / row["kernel"]["median_ms"])
        assert row["kernel_tflops"] * row["kernel"]["median_ms"] * 1e9 == pytest.approx(2 * 16 * 32 * 16)
    assert all(bar["met"] is None for bar in record["targets"])  # a CPU proves no promise
    output = capsys.readouterr().out
    assert output.count("not measured") == len(record["targets"]) and max(map(len, output.splitlines())) <= 120


@interpreted
def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Negative control: the kernel's results are compared, and the script says so by its status."""
    right = matmul.by_kernel
    monkeypatch.setattr(
        "benchmarks.matmul_contenders.by_kernel", lambda *place: lambda: tuple(2 * y for y in right(*place)())
    )
    assert matmul.main(["--device", "cpu", "--rounds", "1", "--output", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "matmul_cpu.json").read_text())["rows"]
    assert all("WrongResult: output 0" in row["error"] and "ratio" not in row for row in rows)


def row(kind: str, size: tuple[int, int, int], ratio: float) -> dict[str, Any]:
    m, n, k = size
    return {"kind": kind, "m": m, "n": n, "k": k, "ratio": ratio}


def test_the_promises_by_hand() -> None:
    square, shard = (8192, 8192, 8192), (8192, 1536, 4096)
    rows = [row("nt plain", square, 0.92), row("nn plain", square, 0.89), row("nt plain", shard, 0.8)]
    rows += [row("nn plain", shard, 1.25), row("nt gelu", shard, 1.0), row("tn accumulate", shard, 0.1)]
    rows.append({"kind": "nt gated", "m": 1, "n": 2, "k": 3, "error": "no memory"})
    found = {bar["target"]: (bar["measured"], bar["met"]) for bar in matmul.bars(rows)}
    assert found == {
        "8192³, each": (0.89, False),
        "shards, each": (0.8, False),
        "bias and GELU, each": (1.0, True),
        "SwiGLU, each": (None, None),
    }


def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(matmul, "INTERPRETED", False)
    for arguments, text in (([], "--device cpu"), (["--device", "cpu"], "TRITON_INTERPRET=1")):
        with pytest.raises(SystemExit):
            matmul.parsed(arguments)
        assert text in capsys.readouterr().err
