"""The kernel benchmark on a CPU: its sums, its check, and the whole script at tiny sizes."""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import kernel_cases, kernel_report, kernels
from benchmarks.device_timing import Stopwatch
from benchmarks.kernel_cases import BUILDERS, CE_VOCAB, LINEAR_CE_VOCAB, TINY, Case, cases
from benchmarks.kernel_measure import Ceiling, Contender, WrongResult, compare, measure
from benchmarks.kernel_providers import DROPOUT, LIGER, MATMULS, OURS, Provider, dropout_add

CPU = torch.device("cpu")
SIZE = TINY[-1]


class Run(NamedTuple):
    """One run of the script."""

    status: int
    record: dict[str, Any]
    output: str
    directory: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every op, quickly."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("results")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = kernels.main(["--device", "cpu", "--quick", "--rounds", "2", "--output", str(directory)])
    record = json.loads((directory / "kernels_cpu_quick.json").read_text())
    return Run(status, record, output.getvalue(), directory)


def test_the_record_says_where_and_how(run: Run) -> None:
    assert run.status == 0
    assert (run.record["schema_version"], run.record["benchmark"]) == (1, "kernels")
    where = run.record["environment"]
    assert {"device", "torch", "triton", "liger_kernel", "python", "command", "commit", "date"} <= where.keys()
    assert where["torch"] == torch.__version__
    assert where["command"].startswith("python -m benchmarks.kernels")
    assert all(value > 0 for value in run.record["ceilings"].values())


def test_every_op_is_timed_beside_plain_torch(run: Run) -> None:
    rows = run.record["rows"]
    assert [row for row in rows if "error" in row] == []
    for op in BUILDERS:
        directions = {"both"} if "cross_entropy" in op else {"forward", "backward", "both"}
        for provider in (OURS, "torch"):
            mine = [row for row in rows if (row["op"], row["provider"]) == (op, provider)]
            assert {row["direction"] for row in mine} == directions
    assert [row["provider"] for row in rows if row["op"] == "linear_cross_entropy"][-1] == MATMULS
    for row in rows:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert (row["dtype"], row["timing"], row["samples"]) == ("float32", "wall", 2)
        rate = row["tflops"] * 1e9 if row["flops"] else row["gb_per_s"] * 1e6
        assert rate * row["median_ms"] == pytest.approx(row["flops"] or row["bytes"])
        unit = "tflops" if row["flops"] else "gb_per_s"
        assert row["fraction"] == pytest.approx(row[unit] / row["ceiling"])


def test_the_table_fits_a_terminal(run: Run) -> None:
    lines = run.output.splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith(OURS) for line in lines) == len(BUILDERS)
    assert "targets" in lines
    promised = [line for line in lines if line.endswith("not measured")]
    assert len(promised) == len(kernel_report.TARGETS) == len(run.record["targets"])


def test_every_op_is_drawn(run: Run) -> None:
    for op in BUILDERS:
        assert (run.directory / f"kernels_cpu_quick_{op}.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_does_not_replace_the_whole() -> None:
    options = kernels.parsed(["--device", "cpu"])
    where = {"device": "NVIDIA H200"}
    assert kernels.file_stem(where, options) == "kernels_cpu"
    options.device = "cuda"
    assert kernels.file_stem(where, options) == "kernels_nvidia_h200"
    options.ops, options.quick = ["rms_norm", "bias_gelu"], True
    assert kernels.file_stem(where, options) == "kernels_nvidia_h200_rms_norm_bias_gelu_quick"


def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        kernels.parsed([])
    assert "--device cpu" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        kernels.parsed(["--device", "cpu", "--rounds", "0"])


def test_bytes_by_hand() -> None:
    """3 tokens, hidden 5, 2 bytes a number: a tensor is 30 bytes, a vector 10."""
    norm = kernel_cases.norm_bytes
    assert norm(3, 5, 2, residual=False, center=False) == (30 + 10 + 30, 30 + 30 + 10 + 30 + 10)
    assert norm(3, 5, 2, residual=True, center=False) == (60 + 10 + 60, 90 + 10 + 30 + 10)
    assert norm(3, 5, 2, residual=False, center=True) == (30 + 20 + 30, 60 + 10 + 30 + 20)
    assert norm(3, 5, 2, residual=True, center=True) == (60 + 20 + 60, 90 + 10 + 30 + 20)
    assert kernel_cases.gated_bytes(3, 5, 2) == (60 + 30, 90 + 60)
    assert kernel_cases.bias_gelu_bytes(3, 5, 2) == (30 + 10 + 30, 60 + 10 + 30 + 10)
    assert kernel_cases.dropout_add_bytes(3, 5, 2) == (60 + 30, 30 + 30)
    # 3 targets of 8 bytes each way; the logits are read twice and written over once
    assert kernel_cases.cross_entropy_bytes(3, 5, 2) == (30 + 24, 30 + 24 + 30)
    # 4 heads and 2 for keys, 16 numbers each: q 384 bytes, k and v 192; cos and sin 3 x 8 fp32 each
    assert kernel_cases.rope_bytes(3, SIZE, 2) == (2 * (384 + 192) + 192, 2 * (384 + 192 + 192) + 192)


def test_forward_and_backward_add_up() -> None:
    (case,) = cases("rms_norm", CPU, quick=True)
    assert case.bytes_of("forward") + case.bytes_of("backward") == case.bytes_of("both")
    assert case.bytes_of("forward") == case.forward_bytes
    (case,) = cases("attention", CPU, quick=True)
    # 4 heads of 32 queries see half of 32 keys: 2 operations for each of 16 numbers, twice, and five times in backward
    assert case.flops_of("forward") == 2 * 4 * 32 * 16 * 2 * 16
    assert case.flops_of("backward") * 2 == 5 * case.flops_of("forward")
    assert case.flops_of("forward") + case.flops_of("backward") == case.flops_of("both")


def test_the_sizes_that_the_targets_name() -> None:
    gpu = torch.device("cuda")
    shapes = {op: [tuple(case.shape.values()) for case in cases(op, gpu, quick=True)] for op in BUILDERS}
    assert shapes["rms_norm"] == [(8192, 4096), (8192, 8192)]
    assert shapes["gated_activation"] == [(8192, 14336), (8192, 28672)]
    assert shapes["split_and_rotate"] == [(8192, 32, 8, 128), (8192, 64, 8, 128)]
    assert shapes["cross_entropy"] == [(8192, 131072)] == [(8192, CE_VOCAB)]
    assert shapes["linear_cross_entropy"] == [(8192, 4096, 128256)] == [(8192, 4096, LINEAR_CE_VOCAB)]
    everything = [case for op in BUILDERS for case in cases(op, gpu, quick=False)]
    assert {case.dtype for case in everything} == {torch.bfloat16}
    assert shapes["attention"] == [(n, 4096 // d, 8, d) for d in (64, 128) for n in (8192, 16384)]
    assert len([case for case in everything if not case.size.main]) == 3 * (len(BUILDERS) - 1) + 2
    (linear,) = cases("linear_cross_entropy", gpu, quick=True)
    assert linear.flops == 3 * 2 * 8192 * 4096 * 128256


def ceiling() -> Ceiling:
    return Ceiling("copy", Stopwatch(lambda: 1e-6, "wall"), 1.0)


def gelu_case(*others: Provider) -> Case:
    case = BUILDERS["bias_gelu"]("bias_gelu", SIZE, torch.float32)
    return replace(case, providers=(*case.providers, *others))


class ZeroGradient(torch.autograd.Function):
    """The value is right, its gradient is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x + bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(dy), dy.sum((0, 1))


def plain(x: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x + bias)


def raising(x: Tensor, bias: Tensor) -> Tensor:
    raise RuntimeError("no such kernel\nand a long story")


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "other values": (lambda x, bias: plain(x, 1.001 * bias), "output 0 is"),
    "NaN": (lambda x, bias: plain(x, bias) * torch.nan, "output 0 is nan"),
    "another shape": (lambda x, bias: plain(x, bias)[0], "instead of (1, 32, 96)"),
    "two outputs": (lambda x, bias: (plain(x, bias), plain(x, bias)), "2 outputs instead of 1"),
    "other gradients": (ZeroGradient.apply, "gradient 0 is"),
    "an error": (raising, "RuntimeError: no such kernel"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_provider_that_computes_something_else_is_not_timed(kind: str) -> None:
    function, message = WRONG[kind]
    case = gelu_case(Provider(LIGER, function, plain, 2))
    rows = measure(case, ("torch", LIGER), ceiling(), CPU, rounds=1)
    assert [row for row in rows if row["provider"] == LIGER] == [rows[0]]
    assert message in rows[0]["error"] and "\n" not in rows[0]["error"]
    assert rows[0]["direction"] is None
    assert {row["direction"] for row in rows[1:]} == {"forward", "backward", "both"}
    assert all("error" not in row for row in rows[1:])


def test_an_op_that_is_wrong_fails_the_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = replace(gelu_case(), providers=(Provider(OURS, lambda x, bias: plain(x, bias) + 1e-3, plain, 2),))
    monkeypatch.setitem(BUILDERS, "bias_gelu", lambda op, size, dtype: wrong)
    arguments = ["--device", "cpu", "--quick", "--rounds", "1", "--ops", "bias_gelu", "--output", str(tmp_path)]
    assert kernels.main(arguments) == 1
    assert "WrongResult: output 0 is" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "kernels_cpu_bias_gelu_quick.json").read_text())["rows"]
    assert "median_ms" not in row


def test_dropout_of_torch_is_judged_by_what_it_dropped() -> None:
    """Its random numbers are its own: right for any mask, wrong for another rate or scale."""
    case = BUILDERS["dropout_add"]("dropout_add", replace(SIZE, tokens=256), torch.float32)
    torch_dropout = dropout_add()[1]
    Contender(case, torch_dropout, CPU).check()
    more = replace(torch_dropout, run=lambda x, r: r + torch.nn.functional.dropout(x, 2 * DROPOUT))
    with pytest.raises(ValueError, match="dropped"):
        Contender(case, more, CPU).check()
    unscaled = replace(torch_dropout, run=lambda x, r: r + torch.nn.functional.dropout(x, DROPOUT) * (1 - DROPOUT))
    with pytest.raises(WrongResult):
        Contender(case, unscaled, CPU).check()


def test_logits_are_restored_before_every_call() -> None:
    case = BUILDERS["cross_entropy"]("cross_entropy", SIZE, torch.float32)
    contender = Contender(case, case.providers[0], CPU)
    work = contender.work("both")
    before = contender.sets[0][0].detach().clone()
    results: list[Any] = []
    for _ in range(2):
        assert work.prepare is not None
        work.prepare()
        assert torch.equal(contender.sets[0][0], before)
        results.append([x.clone() for x in work.calls[0]()])  # type: ignore[attr-defined]
    assert not torch.equal(contender.sets[0][0], before)  # the gradient lies there
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


class Greedy(torch.autograd.Function):
    """Writes its gradient over the one it is given, as some of Liger's do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        return x + bias

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        dbias = dy.sum((0, 1))
        return dy.mul_(3), dbias


def test_a_gradient_written_over_another_is_still_judged() -> None:
    case = gelu_case()
    with pytest.raises(WrongResult, match="gradient 0"):
        Contender(case, Provider(LIGER, Greedy.apply, lambda x, bias: x + bias, 2), CPU).check()
    Contender(case, Provider(LIGER, Greedy.apply, lambda x, bias: 3 * x - 2 * x.detach() + bias, 2), CPU).check()


def test_compare_wants_every_number() -> None:
    x = torch.arange(4.0)
    compare("output", (x + 1e-6,), (x,), 1e-5)
    with pytest.raises(WrongResult, match="off the reference"):
        compare("output", (x, x + 1e-3), (x, x), 1e-5)
    compare("gradient", (torch.zeros(2),), (torch.zeros(2),), 1e-5)


def timed(op: str, direction: str, provider: str, milliseconds: float, fraction: float, size: str = "8b") -> Any:
    shape = {"tokens": {"8b": 1, "70b": 2, "sweep": 3}[size]}
    return {
        "op": op,
        "direction": direction,
        "provider": provider,
        "median_ms": milliseconds,
        "fraction": fraction,
        "size": size,
        "main": size != "sweep",
        "shape": shape,
    }


def test_targets_are_met_missed_or_not_measured() -> None:
    rows = [
        timed("rms_norm", "forward", OURS, 1.0, 0.91),
        timed("rms_norm", "forward", OURS, 1.0, 0.87, size="70b"),
        timed("rms_norm", "forward", OURS, 1.0, 0.10, size="sweep"),
        timed("rms_norm", "backward", OURS, 1.0, 0.80),
        timed("rms_norm", "backward", LIGER, 1.5, 0.50),
        timed("linear_cross_entropy", "both", OURS, 1.05, 0.9),
        timed("linear_cross_entropy", "both", MATMULS, 1.0, 0.9),
        timed("cross_entropy", "both", OURS, 1.0, 0.7) | {"error": "it broke"},
    ]
    lines = list(kernel_report.verdicts(kernel_report.judge(rows, on_cuda=True)))
    found = {" ".join(line.split()) for line in lines}
    assert "rms_norm forward >= 0.90 of copy (8b) 0.910 met" in found
    assert "rms_norm forward >= 0.90 of copy (70b) 0.870 missed by 0.030" in found
    assert "rms_norm backward >= 0.80 of copy (8b) 0.800 met" in found
    assert "rms_norm backward >= 2.00x as fast as liger (8b) 1.500 missed by 0.500" in found
    assert "linear_cross_entropy both <= 1.10x time of 3 x torch.mm (8b) 1.050 met" in found
    assert "cross_entropy both >= 0.75 of copy not measured" in found
    assert not any("sweep" in line for line in lines)
    assert all(entry["met"] is None for entry in kernel_report.judge(rows, on_cuda=False))
