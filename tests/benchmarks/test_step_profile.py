"""The profile of a step: which group each name belongs to, what a trace is read as, what is written."""

import ast
import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tpformer_kernels
from benchmarks import step_profile, step_report
from benchmarks.step_groups import GROUPS, OTHER, RANGES, group_of
from benchmarks.step_trace import Piece, pieces

ROOT = Path(__file__).parents[2]
MODULES = list(pkgutil.iter_modules(tpformer_kernels.__path__))
KERNEL = "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, float, float>>(int)"

KNOWN = {
    "optimizer": ["aten::_fused_adamw_", "Optimizer.step#AdamW.step", "step: optimizer", "aten::_foreach_norm"],
    "collectives": ["c10d::allreduce_", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevComm*)", "gloo:all_reduce"],
    "attention": [
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "ScaledDotProductFlashAttentionForCpuBackward0",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>(Flash_fwd_params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64",
        "_attention_forward_kernel",
        "tpformer::attention_backward",
        "_softmax_forward_kernel",
        "aten::bmm",
    ],
    "rope": ["_rope_kernel", "tpformer::rope_pack", "_SplitAndRotateBackward", "_Rotate", "aten::cos"],
    "norm": ["_norm_backward_wide_kernel", "tpformer::norm_forward", "_NormBackward", "aten::native_layer_norm"],
    "gated, gelu": ["_gated_forward_kernel", "tpformer::bias_gelu_backward", "aten::silu_backward", "_GatedProduct"],
    "dropout": ["_dropout_add_kernel", "tpformer::dropout_add", "_DropoutAddBackward"],
    "embedding": ["aten::embedding", "_VocabParallelLookupBackward"],
    "matmul": [
        "aten::addmm_",
        "_RowLinearBackward",
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT",
        "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x16_stage4_cublas",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>(Params)",
        "_matmul_accumulate_kernel",
        "tpformer::matmul_activated",
        "tpformer::onednn_matmul",
        "tpformer::accumulate_",
        "mkldnn::_linear_pointwise",
    ],
    "cross entropy": ["_statistics_kernel", "_gradient_kernel", "tpformer::cross_entropy_gradient_", "_Recomputing"],
    "sums": ["aten::add_", "torch::autograd::AccumulateGrad"],
    "copies, casts": ["aten::copy_", "aten::_to_copy", "Memcpy DtoD (Device -> Device)", "CloneBackward0"],
    OTHER: ["aten::unheard_of", KERNEL, "aten::add_relu_and_more", "tpformer::", "triton_poi_fused_0", ""],
}


@pytest.mark.parametrize("group", KNOWN)
def test_known_names_have_their_group(group: str) -> None:
    assert {name: group_of([name]) for name in KNOWN[group]} == dict.fromkeys(KNOWN[group], group)


def test_every_group_is_tried_and_has_a_colour_of_its_own() -> None:
    assert KNOWN.keys() == GROUPS.keys()
    assert len({group.color for group in GROUPS.values()}) == len(GROUPS)


def test_operators_around_decide_for_names_that_many_use() -> None:
    assert group_of([KERNEL, "aten::mul", "_NormBackward"]) == "norm"
    assert group_of(["aten::mv", "_NormBackward"]) == "norm"  # a product, but of the norm
    assert group_of(["aten::mm", "_LinearCrossEntropy"]) == "matmul"
    assert group_of(["aten::exp_", "_LinearCrossEntropy"]) == "cross entropy"
    assert group_of(["aten::copy_", "aten::to", "step: optimizer"]) == "optimizer"
    assert group_of([KERNEL, "aten::mul"]) == OTHER


def unknown_operators() -> list[str]:
    """Operators of ours that no group knows."""
    names = torch._C._dispatch_get_all_op_names()
    ours = [name for name in names if name.startswith("tpformer::")]
    assert len(ours) > 10
    return [name for name in ours if group_of([name.split(".")[0]]) == OTHER]


def test_every_operator_of_ours_has_a_group() -> None:
    assert unknown_operators() == []


def test_an_operator_without_a_group_is_seen() -> None:
    """Negative control."""
    library = torch.library.Library("tpformer", "FRAGMENT")
    library.define("unheard_of(Tensor x) -> Tensor")
    try:
        assert unknown_operators() == ["tpformer::unheard_of"]
    finally:
        library._destroy()


def test_every_kernel_of_ours_has_a_group() -> None:
    modules = [importlib.import_module(f"tpformer_kernels.{m.name}") for m in MODULES]
    names = {name for module in modules for name in vars(module) if name.startswith("_") and name.endswith("_kernel")}
    assert {"_norm_forward_kernel", "_statistics_kernel"} <= names
    assert [name for name in sorted(names) if group_of([name]) == OTHER] == []


def autograd_functions() -> Iterator[str]:
    """Names of our autograd functions, by which a backward is known in a trace."""
    for path in [*(ROOT / "tpformer").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith(".Function") for base in node.bases):
                yield node.name


def test_every_autograd_function_of_ours_has_a_group() -> None:
    names = [name + suffix for name in autograd_functions() for suffix in ("", "Backward")]
    assert "_NormBackward" in names and "_ColumnLinear" in names
    assert [name for name in names if group_of([name]) == OTHER] == []


def event(cat: str, name: str, start: float, duration: float, tid: int = 1, link: int | None = None) -> dict[str, Any]:
    args = {} if link is None else {"External id": link}
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": start, "dur": duration, "args": args}


def cuda_trace() -> list[dict[str, Any]]:
    """A step as CUDA's trace has it: launches on two threads, kernels later on a stream, ranges on both sides."""
    return [
        event("user_annotation", RANGES["forward"], 0, 100),
        event("gpu_user_annotation", RANGES["forward"], 50, 900, tid=7),
        event("cpu_op", "_RowLinear", 10, 50, link=1),
        event("cpu_op", "aten::mm", 20, 30, link=2),
        event("cuda_runtime", "cudaLaunchKernel", 25, 5, link=2),
        event("kernel", "nvjet_tst_128x256", 60, 4000, tid=7, link=2),
        event("user_annotation", RANGES["backward"], 100, 100),
        event(
            "cpu_op",
            "autograd::engine::evaluate_function: ScaledDotProductCudnnAttentionBackward0",
            110,
            60,
            tid=2,
            link=3,
        ),
        event("cpu_op", "ScaledDotProductCudnnAttentionBackward0", 112, 30, tid=2, link=4),
        event("cpu_op", "aten::mul", 115, 10, tid=2, link=5),
        event("kernel", KERNEL, 5000, 1000, tid=7, link=5),
        event("cpu_op", "aten::add_", 150, 10, tid=2, link=6),
        event("kernel", KERNEL, 6000, 500, tid=7, link=6),
        event("kernel", "_rope_kernel", 7000, 250, tid=7),  # linked to nothing
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 7500, 250, tid=7, link=99),
    ]


def test_kernels_go_by_their_launch_and_without_one_by_their_name() -> None:
    found = pieces(cuda_trace(), on_cuda=True)
    assert [(group_of(piece.names), piece.part, piece.ms) for piece in found] == [
        ("matmul", "forward", 4.0),
        ("attention", "backward", 1.0),  # launched by another thread than the one that called backward
        ("sums", "backward", 0.5),  # beside the backward, in the same call of the engine
        ("rope", None, 0.25),
        ("copies, casts", None, 0.25),
    ]


def test_operators_on_a_cpu_count_without_those_inside() -> None:
    found = pieces(cuda_trace(), on_cuda=False)
    assert [(piece.names[0], round(1e3 * piece.ms)) for piece in found] == [
        ("_RowLinear", 20),
        ("aten::mm", 30),
        ("ScaledDotProductCudnnAttentionBackward0", 20),  # the engine's own time
        ("ScaledDotProductCudnnAttentionBackward0", 20),
        ("aten::mul", 10),
        ("aten::add_", 10),
    ]
    assert sum(piece.ms for piece in found) == pytest.approx((50 + 60) / 1e3)  # all of the outermost ones
    assert {piece.part for piece in found} == {"forward", "backward"}


def test_shares_sum_to_one_and_unknown_names_warn() -> None:
    made = [
        Piece(("aten::mm", "_RowLinear"), "forward", 6.0),
        Piece(("aten::mm", "_RowLinearBackward"), "backward", 3.0),
        Piece(("aten::unheard_of",), "forward", 1.0),
    ]
    rows = step_report.groups(made, rounds=2)
    assert [(row["group"], row["ms"], row["share"]) for row in rows] == [("matmul", 4.5, 0.9), (OTHER, 0.5, 0.1)]
    assert (rows[0]["forward_ms"], rows[0]["backward_ms"], rows[0]["calls"]) == (3.0, 1.5, 1.0)
    assert rows[0]["slowest"][0] == {"name": "aten::mm", "inside": ["_RowLinear"], "ms": 3.0}
    assert step_report.warnings(rows) == []  # a tenth, not more
    rows = step_report.groups([*made, Piece(("aten::unheard_of", "aten::around"), None, 0.1)], rounds=2)
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=1e-12)
    first, *names = step_report.warnings(rows)
    assert first.startswith("warning: no group knows 10.9 % of the time")
    assert names == ["  aten::unheard_of", "  aten::unheard_of in aten::around"]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["aten::mm", "_RowLinear"], "mm"),
        ([KERNEL, "aten::mul"], "mul"),
        (["void (anonymous namespace)::softmax_warp<float>(float*)"], "softmax_warp"),
        (["void pytorch_flash::flash_fwd_kernel<Traits<64>>(Params)", "aten::x"], "flash_fwd_kernel"),
        (["Memcpy DtoD (Device -> Device)"], "Memcpy DtoD"),
        (["_norm_forward_kernel", "tpformer::norm_forward"], "_norm_forward_kernel"),
    ],
)
def test_short_names(names: list[str], short: str) -> None:
    assert step_report.label({"name": names[0], "inside": names[1:]}) == short


def test_an_unknown_operator_that_runs_is_seen() -> None:
    """Negative control, through the profiler itself."""
    x, weight = torch.ones(256, 1024), torch.ones(64, 64)

    def step() -> None:
        with torch.profiler.record_function(RANGES["forward"]):
            weight @ weight
            torch.special.bessel_j0(x)

    found, seconds = step_profile.profiled(step, torch.device("cpu"))
    rows = {row["group"]: row for row in step_report.groups(found, rounds=1)}
    assert rows[OTHER]["slowest"][0]["name"] == "aten::special_bessel_j0"
    assert rows[OTHER]["share"] > 0.1 and rows["matmul"]["ms"] > 0
    assert any("aten::special_bessel_j0" in line for line in step_report.warnings(list(rows.values())))
    assert sum(row["ms"] for row in rows.values()) <= 1e3 * seconds


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the command at its small shape, with an optimizer and dropout."""
    folder = tmp_path_factory.mktemp("profile") / "results"
    flags = ["--device", "cpu", "--preset", "small", "--optimizer", "--dropout", "0.1", "--rounds", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["step_profile.py", *flags, "--warmup", "0", "--results", str(folder)])
        threads = torch.get_num_threads()
        step_profile.main()
        torch.set_num_threads(threads)
    return folder


def test_record_and_chart_are_written(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == ["step_profile_cpu.json", "step_profile_cpu.png"]
    assert (written / "step_profile_cpu.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((written / "step_profile_cpu.json").read_text())
    assert record["environment"]["command"].startswith("python -m benchmarks.step_profile --device cpu")
    assert record["idle_ms"] is None and len(record["samples_ms"]) == len(record["profiled_samples_ms"]) == 2
    assert sum(row["share"] for row in record["groups"]) == pytest.approx(1)
    assert sum(row["ms"] for row in record["groups"]) == pytest.approx(record["busy_ms"])
    # nothing is counted twice: operators' own times fit into the steps that they are of
    assert 2 * record["busy_ms"] <= sum(record["profiled_samples_ms"])


def test_a_step_is_divided_as_it_is_built(written: Path) -> None:
    rows = {row["group"]: row for row in json.loads((written / "step_profile_cpu.json").read_text())["groups"]}
    assert set(rows) == set(GROUPS) - {"collectives"}
    assert rows[OTHER]["share"] < step_report.MOST_OTHER
    for name in ("matmul", "attention", "rope", "norm", "gated, gelu", "dropout", "embedding"):
        assert rows[name]["forward_ms"] > 0 and rows[name]["backward_ms"] > 0
        assert rows[name]["forward_ms"] + rows[name]["backward_ms"] == pytest.approx(rows[name]["ms"])
    assert rows["optimizer"]["ms"] == rows["optimizer"]["optimizer_ms"] > 0
    assert max(row["share"] for row in rows.values()) == rows["matmul"]["share"]


def test_the_table_fits_a_terminal(written: Path) -> None:
    record = json.loads((written / "step_profile_cpu.json").read_text())
    lines = step_report.table(record)
    assert max(map(len, lines)) <= 80
    assert not any(line.startswith(("idle", "warning")) for line in lines)
    on_cuda = record | {"idle_ms": 12345.67, "step_ms": 1e5, "profiled_step_ms": 1.1e5, "busy_ms": 87654.33}
    wide = [row | {"ms": 12345.67, "forward_ms": 12345.67, "calls": 123456.0} for row in record["groups"]]
    lines = step_report.table(on_cuda | {"groups": wide})
    assert max(map(len, lines)) <= 80
    assert "idle           12345.67   of the step, beside the kernels" in lines
    assert lines[-1].endswith("by the clock; with the profiler 110000.00 (+10.0 %)")


def test_idle_is_the_step_without_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.environment", lambda module, device: {})  # it would ask a GPU for its name
    options = step_profile.Options(device="cuda", preset="small")
    measured = step_profile.Measured(pieces(cuda_trace(), on_cuda=True), [0.010], [0.011])
    record = step_profile.record(options, measured, torch.device("cuda"))
    assert record["busy_ms"] == 6.0 and record["idle_ms"] == pytest.approx(4.0)
    assert record["step_ms"] == pytest.approx(10.0) and record["dtype"] == "bfloat16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["step_profile.py", "--device", "cuda"])
    with pytest.raises(SystemExit, match="torch sees none"):
        step_profile.main()


@pytest.mark.parametrize(
    ("preset", "millions"), [("small", 3.57), ("training", 113), ("1b", 1499), ("8b-layers", 1923)]
)
def test_presets(preset: Any, millions: float) -> None:
    config, batch = step_profile.Options(device="cpu", preset=preset).shape()
    assert config.num_parameters() / 1e6 == pytest.approx(millions, rel=5e-3) and batch in (1, 2)
