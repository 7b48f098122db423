"""Published step times and rates of training runs, as data: what the planner's predictions are compared with.

Sources: arXiv 1909.08053 (2019), Megatron-LM's README of September 2020, arXiv 2104.04473 (SC21), arXiv 2205.05198
(2022), Megatron-LM's README of July 2024 (H100), torchtitan's benchmarks of December 2024 and June 2025.
"""

from dataclasses import replace
from typing import Any

from benchmarks.published_row import Published
from tpformer.models.gpt import GPTConfig
from tpformer.models.llama import LlamaConfig
from tpformer.parallel_config import ParallelConfig


def rows() -> list[Published]:
    """Every row, oldest table first."""
    return [*megatron_2019(), *megatron_2020(), *sc21(), *zero3(), *selective_2022(), *h100_2024(), *torchtitan()]


def _gpt(hidden: int, heads: int, layers: int, seq_len: int, vocabulary: int = 51200, tied: bool = True) -> GPTConfig:
    return GPTConfig(vocabulary, hidden, layers, heads, max_seq_len=seq_len, tie_embeddings=tied)


FULL: dict[str, Any] = {"recompute": "full", "precision": "fp16"}
INTERLEAVED: dict[str, Any] = {"pp_schedule": "interleaved_1f1b"}

SHAPES_2019 = {  # hidden, heads, layers, tp
    "1.2B": (1536, 16, 40, 1),
    "2.5B": (1920, 20, 54, 2),
    "4.2B": (2304, 24, 64, 4),
    "8.3B": (3072, 32, 72, 8),
}


def megatron_2019() -> list[Published]:
    """Weak scaling of tensor parallelism, figure 5, and strong scaling of the 1.2B, appendix D; DGX-2H.

    Published are efficiencies against 39 TFLOP/s of the 1.2B on one GPU; rates are their products.
    """
    weak = {"1.2B": (100, 96), "2.5B": (95, 83), "4.2B": (82, 79), "8.3B": (77, 74)}
    strong = {2: 1.64, 4: 2.34, 8: 2.98}
    found = []
    for name, efficiencies in weak.items():
        for dp, percent in zip((1, 64), efficiencies, strict=True):
            note = f"weak scaling, efficiency {percent} % of 39 TFLOP/s"
            found.append(_row_2019(name, SHAPES_2019[name][3], dp, 39 * percent / 100, note))
    for tp, speedup in strong.items():
        note = f"strong scaling, {speedup} x one GPU of 39 TFLOP/s"
        found.append(_row_2019("1.2B", tp, 1, 39 * speedup / tp, note))
    return found


def _row_2019(name: str, tp: int, dp: int, tflops: float, note: str) -> Published:
    hidden, heads, layers, _ = SHAPES_2019[name]
    return Published(
        table="2019",
        name=f"{name} tp{tp} dp{dp}",
        model=_gpt(hidden, heads, layers, 1024),
        parameters=float(name[:-1]) * 1e9,
        parallel=ParallelConfig(tp=tp, dp=dp, **FULL),
        seq_len=1024,
        batch_size=8 * dp,
        micro_batch_size=8,
        device="v100-dgx-2h",
        network="ib-50",
        tflops=tflops,
        counted="hardware",
        note=note,
    )


def megatron_2020() -> list[Published]:
    """Weak scaling of tensor parallelism on a DGX-2 (V100) and on Selene (A100), there with 128 replicas too.

    Sequences of 1024 tokens, full recomputation: by these the published milliseconds give the published rates."""
    shapes = {  # hidden, heads, layers, tp, 10^9 parameters
        "1B": (1920, 15, 24, 1, 1.16),
        "2B": (2304, 18, 30, 2, 2.03),
        "4B": (3072, 24, 36, 4, 4.24),
        "8B": (4096, 32, 42, 8, 8.67),
    }
    published = {  # milliseconds and TFLOP/s: V100, A100, A100 with 128 replicas
        "1B": ((1121, 71.9), (1076, 149.8), (1153, 139.8)),
        "2B": ((1093, 64.2), (1026, 136.8), (1101, 127.5)),
        "4B": ((1238, 58.5), (1162, 124.7), (1242, 116.7)),
        "8B": ((1407, 52.2), (1343, 109.3), (1380, 106.5)),
    }
    found = []
    for column, (device, batch, dp) in enumerate(
        (("v100-sxm2-32", 8, 1), ("a100-sxm-40", 16, 1), ("a100-sxm-40", 16, 128))
    ):
        for name, (hidden, heads, layers, tp, billions) in shapes.items():
            milliseconds, tflops = published[name][column]
            found.append(
                Published(
                    table="2020",
                    name=f"{name} {device[:4]} tp{tp} dp{dp}",
                    model=_gpt(hidden, heads, layers, 1024),
                    parameters=billions * 1e9,
                    parallel=ParallelConfig(tp=tp, dp=dp, **FULL),
                    seq_len=1024,
                    batch_size=batch * dp,
                    micro_batch_size=batch,
                    device=device,
                    network="ib-200",
                    tflops=tflops,
                    seconds=milliseconds / 1000,
                    counted="hardware",
                )
            )
    return found


def _selene(table: str, name: str, shape: tuple[int, int, int], parallel: ParallelConfig, **rest: Any) -> Published:
    """A GPT of 2048 tokens a sample on Selene's DGX A100s. shape: hidden, heads, layers."""
    return Published(
        table=table,
        name=f"{name} tp{parallel.tp} pp{parallel.pp} dp{parallel.dp}",
        model=_gpt(*shape, 2048),
        parameters=float(name[:-1]) * 1e9,
        parallel=parallel,
        seq_len=2048,
        device="a100-sxm-80",
        network="ib-200",
        **rest,
    )


def sc21() -> list[Published]:
    """Table 1 of arXiv 2104.04473: weak scaling over all three axes. Micro-batches are not published."""
    shapes = {  # hidden, heads, layers, tp, pp, gpus, batch, TFLOP/s, PFLOP/s of all
        "1.7B": (2304, 24, 24, 1, 1, 32, 512, 137, 4.4),
        "3.6B": (3072, 32, 30, 2, 1, 64, 512, 138, 8.8),
        "7.5B": (4096, 32, 36, 4, 1, 128, 512, 142, 18.2),
        "18.4B": (6144, 48, 40, 8, 1, 256, 1024, 135, 34.6),
        "39.1B": (8192, 64, 48, 8, 2, 512, 1536, 138, 70.8),
        "76.1B": (10240, 80, 60, 8, 4, 1024, 1792, 140, 143.8),
        "145.6B": (12288, 96, 80, 8, 8, 1536, 2304, 148, 227.1),
        "310.1B": (16384, 128, 96, 8, 16, 1920, 2160, 155, 297.4),
        "529.6B": (20480, 128, 105, 8, 35, 2520, 2520, 163, 410.2),
        "1008.0B": (25600, 160, 128, 8, 64, 3072, 3072, 163, 502.0),
    }
    found = []
    for name, (hidden, heads, layers, tp, pp, gpus, batch, tflops, petaflops) in shapes.items():
        parallel = ParallelConfig(tp=tp, pp=pp, dp=gpus // tp // pp, **_sc21_pipeline(layers, pp), **FULL)
        rest = {"batch_size": batch, "micro_batch_size": None, "tflops": tflops, "petaflops": petaflops}
        note = "stages of a rank not published; 2 are taken, 3 where blocks divide by it only" if pp > 1 else ""
        found.append(_selene("SC21", name, (hidden, heads, layers), parallel, counted="hardware", note=note, **rest))
    return found


def _sc21_pipeline(layers: int, pp: int) -> dict[str, Any]:
    if pp == 1:
        return {}
    return {**INTERLEAVED, "stages_per_rank": 2 if layers // pp % 2 == 0 else 3}


def zero3() -> list[Published]:
    """Table 2 of arXiv 2104.04473: ZeRO-3 without model parallelism beside tensor and pipeline parallelism."""
    small, large = ("174.6B", (12288, 96, 96)), ("529.6B", (20480, 128, 105))
    split = [  # model, pp, gpus, batch, TFLOP/s
        *((small, 12, gpus, 1536, tflops) for gpus, tflops in ((384, 153), (768, 149), (1536, 141))),
        *((large, 35, gpus, 2240, tflops) for gpus, tflops in ((560, 171), (1120, 167), (2240, 159))),
    ]
    sharded = [  # model, gpus, batch, micro-batch, TFLOP/s
        *((small, gpus, 1536, micro, tflops) for gpus, micro, tflops in ((384, 4, 144), (768, 2, 88), (1536, 1, 44))),
        (large, 640, 2560, 4, 138),
        (large, 1120, 2240, 2, 98),
        (large, 2240, 2240, 1, 48),
    ]
    found = []
    for (name, shape), pp, gpus, batch, tflops in split:
        parallel = ParallelConfig(tp=8, pp=pp, dp=gpus // 8 // pp, **_sc21_pipeline(shape[2], pp), **FULL)
        rest = {"batch_size": batch, "micro_batch_size": 1, "tflops": tflops}
        found.append(_selene("SC21 table 2", name, shape, parallel, counted="hardware", **rest))
    for (name, shape), gpus, batch, micro, tflops in sharded:
        parallel = ParallelConfig(dp=gpus, dp_mode="fsdp", **FULL)
        rest = {"batch_size": batch, "micro_batch_size": micro, "tflops": tflops}
        found.append(_selene("SC21 ZeRO-3", name, shape, parallel, counted="hardware", **rest))
    return found


def selective_2022() -> list[Published]:
    """Table 5 of arXiv 2205.05198: full recomputation, then sequence parallelism with selective recomputation.

    Published MFU is of the latter. Its hardware FLOPs (published HFU 43.7, 52.8, 57.0, 57.0 %) are left out: their
    formula has s/3h where 2s/9h is meant (NVIDIA/Megatron-LM issue 523).
    """
    shapes = {  # hidden, heads, layers, pp, stages of a rank, batch, micro-batch, seconds, seconds now, MFU
        "22B": (6144, 64, 48, 1, 1, 4, 4, 1.42, 1.10, 0.415),
        "175B": (12288, 96, 96, 8, 3, 64, 1, 18.13, 13.75, 0.514),
        "530B": (20480, 128, 105, 35, 3, 280, 1, 49.05, 37.83, 0.560),
        "1000B": (25600, 160, 128, 64, 1, 512, 1, 94.42, 71.49, 0.563),
    }
    present: dict[str, Any] = {"recompute": "selective", "precision": "fp16", "sequence_parallel": True}
    found = []
    for name, (hidden, heads, layers, pp, stages, batch, micro, before, now, mfu) in shapes.items():
        pipeline: dict[str, Any] = {**INTERLEAVED, "stages_per_rank": stages} if stages > 1 else {}
        shape = (hidden, heads, layers)
        sizes = {"batch_size": batch, "micro_batch_size": micro}
        full = ParallelConfig(tp=8, pp=pp, dp=1, **pipeline, **FULL)
        found.append(_selene("2022 full", name, shape, full, seconds=before, counted="hardware", **sizes))
        parallel = ParallelConfig(tp=8, pp=pp, dp=1, **pipeline, **present)
        found.append(_selene("2022 present", name, shape, parallel, seconds=now, mfu=mfu, **sizes))
        if name == "530B":
            eight = replace(parallel, dp=8)
            sizes = {"batch_size": 8 * batch, "micro_batch_size": micro}
            found.append(_selene("2022 present", name, shape, eight, seconds=39.15, mfu=0.542, **sizes))
    return found


def h100_2024() -> list[Published]:
    """Megatron-Core 0.8 on H100s, bf16, 48 replicas. Micro-batches, virtual stages and recomputation: not published."""
    shapes = {  # hidden, heads, layers, tp, pp, batch, TFLOP/s, MFU, PFLOP/s of all
        "1.7B": (2048, 16, 24, 1, 1, 192, 408.8, 0.41, 19.6),
        "7.1B": (4096, 32, 30, 2, 1, 192, 465.9, 0.47, 44.7),
        "16B": (6144, 48, 32, 4, 1, 192, 489.1, 0.49, 93.9),
        "32B": (7168, 56, 48, 8, 1, 192, 459.6, 0.46, 176.5),
        "70B": (8192, 64, 84, 8, 2, 384, 419.7, 0.42, 322.3),
        "119B": (10240, 80, 92, 8, 4, 768, 420.5, 0.43, 645.9),
        "177B": (12288, 96, 96, 8, 6, 1152, 432.8, 0.44, 997.2),
        "314B": (16384, 128, 96, 8, 8, 1536, 474.4, 0.48, 1457.4),
        "462B": (18432, 144, 112, 8, 16, 3072, 459.9, 0.47, 2825.6),
    }
    found = []
    for name, (hidden, heads, layers, tp, pp, batch, tflops, mfu, petaflops) in shapes.items():
        found.append(
            Published(
                table="H100",
                name=f"{name} tp{tp} pp{pp} dp48",
                model=_gpt(hidden, heads, layers, 4096, 131072, tied=False),
                parameters=float(name[:-1]) * 1e9,
                parallel=ParallelConfig(
                    tp=tp, pp=pp, dp=48, sequence_parallel=tp > 1, dp_mode="zero2", precision="bf16"
                ),
                seq_len=4096,
                batch_size=batch,
                micro_batch_size=None,
                device="h100-sxm",
                network="ib-400",
                tflops=tflops,
                mfu=mfu,
                petaflops=petaflops,
                fused_attention=True,
                note="sequence parallelism and the sharded optimizer are that version's usual flags, not published",
            )
        )
    return found


def torchtitan() -> list[Published]:
    """torchtitan's bf16 rows with their layouts: Llama 3 at 8192 tokens on H100s of 96 GB, 2.4 TB/s and 500 W."""
    small = LlamaConfig(128256, 4096, 32, 32, 8, ffn_hidden_size=14336, max_seq_len=8192)
    large = LlamaConfig(128256, 8192, 80, 64, 8, ffn_hidden_size=28672, max_seq_len=8192)
    own = "operators' own selective recomputation"
    published = [  # table, model, 10^9 parameters, tp, dp, local batch, recompute, tokens/s of a GPU, TFLOP/s, note
        ("torchtitan 2024", small, 8.03, 1, 8, 2, "selective", 5762, None, f"eager; {own}"),
        ("torchtitan 2024", small, 8.03, 1, 8, 2, "selective", 6667, None, f"compiled; {own}"),
        ("torchtitan 2024", small, 8.03, 1, 128, 2, "selective", 5605, None, f"eager; {own}"),
        ("torchtitan 2024", small, 8.03, 1, 128, 2, "selective", 6514, None, f"compiled; {own}"),
        ("torchtitan 2025", large, 70.6, 8, 32, 16, "full", 597.3, None, "compiled"),
        ("torchtitan 2025", large, 70.6, 8, 32, 16, "full", 652.4, None, "compiled; asynchronous tensor parallelism"),
        ("torchtitan 2025", small, 8.03, 8, 8, 12, "selective", 4378, None, f"compiled; {own}"),
        ("torchtitan 2025", small, 8.03, 8, 8, 12, "selective", 4809.4, None, f"compiled; asynchronous; {own}"),
        ("torchtitan 2026", small, 8.03, 2, 4, None, "none", 4878, 282.5, "pull request 2570; batch not published: 1"),
    ]
    found = []
    for table, model, billions, tp, dp, local, recompute, tokens, tflops, note in published:
        options: dict[str, Any] = {"recompute": recompute, "compile": "compiled" in note, "precision": "bf16"}
        found.append(
            Published(
                table=table,
                name=f"{'8B' if model is small else '70B'} tp{tp} dp{dp} {tokens:g} tokens/s",
                model=model,
                parameters=billions * 1e9,
                parallel=ParallelConfig(tp=tp, dp=dp, sequence_parallel=tp > 1, dp_mode="fsdp", **options),
                seq_len=8192,
                batch_size=(local or 1) * dp,
                micro_batch_size=local,
                device="h100-sxm",
                network="ib-400",
                tflops=tflops,
                tokens=tokens,
                fused_attention=True,
                note=note,
            )
        )
    return found
