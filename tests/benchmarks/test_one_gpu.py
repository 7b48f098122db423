"""The one-GPU comparison, on a CPU with a tiny model: what it records, what it refuses, what it survives."""

import dataclasses
import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import one_gpu, one_gpu_report, training
from benchmarks.one_gpu_contenders import (
    Builder,
    Compiler,
    Contender,
    Setting,
    Weights,
    all_contenders,
    hugging_face,
    initial_weights,
    plain,
    tpformer,
)
from benchmarks.peers.plain import PlainLlamaConfig
from tpformer import LlamaConfig

CONFIG = PlainLlamaConfig(  # a vocabulary that tpformer must pad, and rotary positions that are not the default's
    vocab_size=250,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_hidden_size=96,
    max_seq_len=16,
    rope_theta=500000.0,
)


def setting(compiler: Compiler = "none") -> Setting:
    return Setting(CONFIG, 2, torch.device("cpu"), torch.float32, compiler, seed=3)


def other_seed(setting: Setting, weights: Weights) -> Contender:
    """A model of the same shape and loss, nearly, with other weights."""
    return tpformer(dataclasses.replace(setting, seed=4), weights)


def swapped(setting: Setting, weights: Weights) -> Contender:
    """One layer's gate taken for its up."""
    name = "blocks.1.mlp.gate_up.weight"
    return plain(setting, weights | {name: weights[name].unflatten(0, (-1, 2)).flip(1).flatten(0, 1)})


def unbuildable(setting: Setting, weights: Weights) -> Contender:
    raise RuntimeError("no kernel for this device\nand a long explanation")


def breaks_after(steps: int) -> Builder:
    """A contender that runs out of memory once it has made so many steps."""

    def build(setting: Setting, weights: Weights) -> Contender:
        good = plain(setting, weights)
        left = iter(range(steps))

        def loss(tokens: Tensor, targets: Tensor) -> Tensor:
            if next(left, None) is None:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return good.loss(tokens, targets)

        return Contender(good.model, loss, good.first_norm)

    return build


def by_name(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in record["contenders"]}


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """All contenders, and some that cannot take part, without torch.compile."""
    pytest.importorskip("transformers")
    extra: dict[str, Builder] = {
        "wrong weights": other_seed,
        "wrong layer": swapped,
        "unbuildable": unbuildable,
        "breaks in a round": breaks_after(3),
    }
    return one_gpu.compare_all(setting(), all_contenders() | extra, rounds=3, warmup=1)


@pytest.mark.parametrize("name", ["plain", "tpformer kernels off", "tpformer", "transformers"])
def test_who_can_run_is_timed(record: dict[str, Any], name: str) -> None:
    row, first = by_name(record)[name], by_name(record)["plain"]
    assert row["failure"] is None
    assert row["loss"] == pytest.approx(first["loss"], rel=1e-5) and row["gradient_error"] < 1e-4
    assert len(row["samples_ms"]) == 3 and min(row["samples_ms"]) <= row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert row["ratio_to_plain"] == pytest.approx(row["median_ms"] / first["median_ms"])
    assert row["tokens_per_second"] == pytest.approx(2 * 16 / (row["median_ms"] / 1e3))
    flops = row["tokens_per_second"] * LlamaConfig(**vars(CONFIG)).flops_per_token(16)
    assert row["mfu"] == {"matmul": pytest.approx(flops / record["flops_per_second"]["matmul"]), "datasheet": None}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wrong weights", "RuntimeError: not the same model: loss off by "),
        ("wrong layer", "RuntimeError: not the same model: loss off by "),
        ("unbuildable", "RuntimeError: no kernel for this device"),
        ("breaks in a round", "OutOfMemoryError: CUDA out of memory"),
        ("plain compiled", "ValueError: left out by --compiler none"),
        ("tpformer compiled", "ValueError: left out by --compiler none"),
    ],
)
def test_who_cannot_is_listed_with_the_reason(record: dict[str, Any], name: str, reason: str) -> None:
    row = by_name(record)[name]
    assert row["failure"].startswith(reason) and "\n" not in row["failure"]
    assert "median_ms" not in row


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="Liger is installed here")
def test_liger_is_listed_where_it_is_not_installed(record: dict[str, Any]) -> None:
    assert by_name(record)["transformers + Liger"]["failure"] == "ModuleNotFoundError: No module named 'liger_kernel'"


def test_the_loss_alone_would_not_tell_the_wrong_layer(record: dict[str, Any]) -> None:
    row, tolerances = by_name(record)["wrong layer"], record["tolerances"]
    assert row["loss_error"] < tolerances["loss"] and row["gradient_error"] > 100 * tolerances["gradient"]


def test_a_failed_reference_ends_the_comparison() -> None:
    with pytest.raises(RuntimeError, match=r"with which the others are compared, failed: .*no kernel"):
        one_gpu.measure(setting(), {"plain": unbuildable, "tpformer": tpformer}, 1, 0)
    with pytest.raises(RuntimeError, match="failed: OutOfMemoryError"):
        one_gpu.measure(setting(), {"plain": breaks_after(1), "tpformer": tpformer}, 1, 0)


def test_record_table_and_chart_are_written(
    record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_gpu_report.write(tmp_path / "results" / "training_cuda_tiny", record)
    read = json.loads((tmp_path / "results" / "training_cuda_tiny.json").read_text())
    assert read == record
    assert read["schema_version"] == 1 and read["environment"]["command"].startswith("python -m benchmarks.training")
    assert read["config"]["batch"] == 2 and read["dtype"] == "float32"
    assert (tmp_path / "results" / "training_cuda_tiny.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "results").iterdir())) == 2
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 100
    assert all(any(line.startswith(f"{row['name']} ") for line in lines) for row in record["contenders"])
    assert any(line.endswith("of the time") and " / transformers: " in line for line in lines)


def test_the_table_of_a_gpu_fits_too(record: dict[str, Any]) -> None:
    large: dict[str, Any] = {"median_ms": 12345.6, "p20_ms": 12345.6, "p80_ms": 12345.6, "tokens_per_second": 1234567.0}
    large |= {"peak_memory_bytes": 130 * 2**30, "mfu": {"matmul": 0.789, "datasheet": 0.567}, "graph_breaks": 3}
    rows = [row | large if row["failure"] is None else row for row in record["contenders"]]
    rates = {"matmul": 789.1e12, "datasheet": 989e12, "matmul_side": 8192}
    lines = one_gpu_report.table(record | {"contenders": rows, "flops_per_second": rates})
    assert max(map(len, lines)) <= 100
    assert "78.9   56.7     130.0" in lines[3]
    assert "plain: 3 graph breaks" in lines


# torch's tracer warns about what it does itself with autograd functions
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_contenders_are_the_same_model_in_one_graph() -> None:
    builders = {name: build for name, build in all_contenders().items() if name.startswith(("plain", "tpformer com"))}
    entries = one_gpu.measure(setting("aot_eager"), builders, rounds=1, warmup=0)
    torch.compiler.reset()
    assert [entry.failure for entry in entries] == [None] * 3
    assert [entry.facts["graph_breaks"] for entry in entries] == [0] * 3  # one graph from tokens to loss


@pytest.mark.parametrize("build", [plain, tpformer, hugging_face])
def test_weights_stay_bf16_and_rotary_frequencies_fp32(build: Callable[..., Contender]) -> None:
    pytest.importorskip("transformers")
    half = dataclasses.replace(setting(), dtype=torch.bfloat16)
    contender = build(half, initial_weights(half))
    assert {p.dtype for p in contender.model.parameters()} == {torch.bfloat16}
    assert all(b.dtype == torch.float32 for name, b in contender.model.named_buffers() if "inv_freq" in name)
    assert contender.step(*one_gpu.text(half)).dtype == torch.float32


@pytest.mark.parametrize(("name", "millions", "tokens"), [("1b", 1499, 8192), ("8b-layers", 1923, 8192)])
def test_presets(name: str, millions: int, tokens: int) -> None:
    config, batch = one_gpu.preset(name)
    full = Setting(config, batch, torch.device("cpu"), torch.bfloat16, "none", 0)
    assert full.tokens == tokens
    assert math.isclose(full.tpformer_config().num_parameters() / 1e6, millions, rel_tol=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["training.py", "--device", "cuda", "--preset", "1b", "--rounds", "5"])
    with pytest.raises(SystemExit, match="torch sees none"):
        training.main()


def test_without_torchrun_the_other_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["training.py", "--device", "cpu", "--layers", "1"])
    with pytest.raises(SystemExit, match="start it with: torchrun"):
        training.main()
