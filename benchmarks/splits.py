"""Pipelines and replicas on two ranks: how much faster than one process, and beside torch's own replicas.

    torchrun --nproc-per-node 2 -m benchmarks.splits

A step is forward, backward and the sum of the gradients over the replicas; no optimizer. All variants of a group hold
the same weights, are checked to give the same loss and stay alive, and are stepped in turn. The pipeline's model is
one that two stages can share evenly (3 blocks; 2 blocks and a head worth one); the replicas' is the training
benchmark's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.peers.plain import PlainLlama, PlainLlamaConfig, load_from_tpformer
from benchmarks.peers.replicas import data_parallel, fully_sharded
from tpformer import Llama, LlamaConfig, Mesh, ParallelConfig, full_parameter
from tpformer.parallel.pipeline import Pipeline
from tpformer.train.build import Training, build
from tpformer.train.config import DataConfig, RunConfig, TrainConfig

Loss = Callable[[], Tensor]
"""A step: this rank's share of the mean loss, gradients left behind."""


@dataclass(frozen=True)
class Options:
    """Time a pipeline of two stages, and two replicas, beside one process. Run it under torchrun with two ranks."""

    hidden: int = 1024
    """Width of the models."""
    seq: int = 512
    """Tokens of a sample for the replicas; half as many for the pipeline."""
    micro_batches: int = 8
    """Of the pipeline, one sample each."""
    batch: int = 2
    """Samples of a replica, in one micro-batch."""
    rounds: int = 5
    """Timed steps of each variant."""
    warmup: int = 1
    """Untimed steps of each variant, besides the one that checks agreement."""
    threads: int = 1
    """CPU threads of each rank."""
    output: Path = Path("benchmarks/results/splits_cpu.json")
    """Where the record is written."""


def llama(options: Options, layers: int, vocab: int, seq: int) -> LlamaConfig:
    """A model of the training benchmark's width, at the default."""
    heads = options.hidden // 64
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=options.hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads // 2,
        ffn_hidden_size=options.hidden * 11 // 4,
        max_seq_len=seq,
    )


def samples_of(model: LlamaConfig, count: int) -> Tensor:
    """Random samples, int64 (count, s + 1), the same on every rank."""
    return torch.randint(model.vocab_size, (count, model.max_seq_len + 1), generator=torch.Generator().manual_seed(0))


def ours(model: LlamaConfig, parallel: ParallelConfig, mesh: Mesh, count: int, micro: int) -> Loss:
    """A step of tpformer on `count` samples over all replicas, in micro-batches of `micro`."""
    config = TrainConfig(
        model=model,
        run=RunConfig(batch_size=count, micro_batch_size=micro),
        data=DataConfig(seq_len=model.max_seq_len),
        parallel=parallel,
    )
    built = build(config, mesh, model.vocab_size)
    mine = count // mesh.dp.size
    samples = samples_of(model, count)[mesh.dp.rank * mine :][:mine].to(mesh.device)
    return lambda: step(built, samples, micro, mesh)


def step(built: Training, samples: Tensor, micro: int, mesh: Mesh) -> Tensor:
    """Forward, backward and the gradients' sum; this rank's share of the mean loss."""
    if isinstance(built.runner, Pipeline):
        total = built.runner.backward(samples)
    else:
        total = torch.zeros((), device=mesh.device)
        parts = samples.split(micro)
        for number, part in enumerate(parts):
            loss = built.runner.loss(part[:, :-1], part[:, 1:]) / (len(parts) * mesh.dp.size)
            built.gradients.start(last=number == len(parts) - 1)
            loss.backward()
            total = total + loss.detach()
    built.gradients.finish()
    return total


def theirs(module: nn.Module, model: LlamaConfig, mesh: Mesh, count: int) -> Loss:
    """A step of a wrapped plain Llama on this replica's samples, in one micro-batch."""
    mine = count // mesh.dp.size
    samples = samples_of(model, count)[mesh.dp.rank * mine :][:mine].to(mesh.device)

    def run() -> Tensor:
        module.zero_grad(set_to_none=True)
        loss = module(samples[:, :-1], samples[:, 1:])
        loss.backward()
        return loss.detach() / mesh.dp.size

    return run


def plain(model: LlamaConfig, mesh: Mesh) -> PlainLlama:
    """The plain Llama with tpformer's initial weights."""
    whole = Llama(model, Mesh(device=mesh.device), seed=RunConfig().seed)
    fields = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_hidden_size", "max_seq_len")
    found = PlainLlama(PlainLlamaConfig(**{name: getattr(model, name) for name in fields}))
    load_from_tpformer(found, {name: full_parameter(whole, name).detach() for name, _ in whole.named_parameters()})
    return found.to(mesh.device)


def pipelines(options: Options, device: str | None) -> dict[str, Loss | None]:
    """One process, and two stages under 1F1B."""
    model = llama(options, 5, 11 * options.hidden, options.seq // 2)
    parallel = ParallelConfig(pp=2)
    split = ours(model, parallel, Mesh.of(parallel, device), options.micro_batches, 1)
    return {"one process": alone(model, options.micro_batches, 1), "pp 2, 1f1b": split}


def replicas(options: Options, device: str | None) -> dict[str, Loss | None]:
    """One process, and two replicas: ours in three modes, and torch's DDP and FSDP2 of the plain Llama."""
    model = llama(options, 4, 32000, options.seq)
    count = 2 * options.batch
    found: dict[str, Loss | None] = {"one process": alone(model, count, options.batch)}
    for mode in ("replicate", "zero2", "fsdp"):
        parallel = ParallelConfig(dp=2, dp_mode=mode)
        found[f"dp 2, {mode}"] = ours(model, parallel, Mesh.of(parallel, device), count, options.batch)
    mesh = Mesh.create(dp=2, device=device)
    assert mesh.device_mesh is not None
    found["torch DDP"] = theirs(data_parallel(plain(model, mesh), mesh.dp.group), model, mesh, count)
    found["torch FSDP2"] = theirs(fully_sharded(plain(model, mesh), mesh.device_mesh["dp"]), model, mesh, count)
    return found


def alone(model: LlamaConfig, count: int, micro: int) -> Loss | None:
    """A step of one process on all samples; the other rank waits."""
    return ours(model, ParallelConfig(), Mesh(), count, micro) if dist.get_rank() == 0 else None


def check_agreement(group: dict[str, Loss | None]) -> float:
    """Step every variant once; raises RuntimeError, on every rank, if a loss is not the first one's. The loss."""
    losses = {}
    for name, run in group.items():
        share = torch.zeros(()) if run is None else run().detach().cpu().float()
        dist.all_reduce(share)
        losses[name] = float(share)
    first = next(iter(losses.values()))
    for name, loss in losses.items():
        if abs(loss - first) > 1e-5 * abs(first):
            raise RuntimeError(f"{name} is not the same model: its loss is {loss:.6f}, not {first:.6f}")
    return first


def measure(options: Options, group: dict[str, Loss | None], device: torch.device) -> list[dict[str, Any]]:
    """A row a variant, with its speed-up over the first; collective."""
    loss = check_agreement(group)
    steps: dict[str, harness.Step | None] = dict(group)
    harness.run_rounds(steps, options.warmup, device, "warm-up")
    timings = {n: harness.Timing.of(s) for n, s in harness.run_rounds(steps, options.rounds, device, "round").items()}
    first = next(iter(timings.values())).median_ms
    return [
        {"name": name, **asdict(timing), "speed_up": first / timing.median_ms, "loss": loss}
        for name, timing in timings.items()
    ]


def targets(pipeline: list[dict[str, Any]], replicated: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """What is asked of the speeds, and what came out."""
    times = {row["name"]: row["median_ms"] for row in replicated}
    ups = {row["name"]: row["speed_up"] for row in pipeline + replicated}
    ideal = 2 * count / (count + 1)
    found = [
        (f"pp 2, 1f1b: part of the ideal speed-up of {ideal:.3f}, at least", 0.9, ups["pp 2, 1f1b"] / ideal, True),
        ("dp 2, replicate: speed-up, at least", 1.85, ups["dp 2, replicate"], True),
        ("dp 2, fsdp / dp 2, replicate: time, at most", 1.10, times["dp 2, fsdp"] / times["dp 2, replicate"], False),
        ("dp 2, replicate / torch DDP: time", None, times["dp 2, replicate"] / times["torch DDP"], False),
        ("dp 2, fsdp / torch FSDP2: time", None, times["dp 2, fsdp"] / times["torch FSDP2"], False),
    ]
    return [
        {"what": what, "target": bound, "measured": value}
        | ({} if bound is None else {"met": value >= bound if least else value <= bound})
        for what, bound, value, least in found
    ]


def print_table(record: dict[str, Any]) -> None:
    """The record as a table for the terminal."""
    print(f"\nmilliseconds of forward + backward + the sum of gradients, fp32, on {record['environment']['device']}")
    print(f"{'variant':18}{'median':>9}{'p20':>9}{'p80':>9}{'quiet':>8}{'speed-up':>10}")
    for row in record["pipeline"] + record["replicas"]:
        quiet = f"{row['quiet']}/{row['total']}{'*' if row['used_all'] else ''}"
        times = "".join(f"{row[name]:9.1f}" for name in ("median_ms", "p20_ms", "p80_ms"))
        print(f"{row['name']:18}{times}{quiet:>8}{row['speed_up']:10.3f}")
    for row in record["targets"]:
        verdict = "" if row["target"] is None else f" (target {row['target']}: {'met' if row['met'] else 'missed'})"
        print(f"{row['what']}: {row['measured']:.3f}{verdict}")


def main() -> None:
    """Read the flags, measure, print and write."""
    options = tyro.cli(Options, prog="benchmarks.splits")
    torch.set_num_threads(options.threads)
    mesh = Mesh.create()
    if mesh.world.size != 2:
        raise SystemExit("start it with: torchrun --nproc-per-node 2 -m benchmarks.splits")
    device = None if mesh.device.type == "cuda" else "cpu"
    pipeline = measure(options, pipelines(options, device), mesh.device)
    replicated = measure(options, replicas(options, device), mesh.device)
    if mesh.world.rank == 0:
        record = {
            "schema_version": 1,
            "benchmark": "splits",
            "config": {key: value for key, value in asdict(options).items() if key != "output"},
            "environment": harness.environment("benchmarks.splits", mesh.device),
            "quiet_below_cores": harness.QUIET_CORES,
            "pipeline": pipeline,
            "replicas": replicated,
            "targets": targets(pipeline, replicated, options.micro_batches),
        }
        harness.write_json(options.output, record)
        print_table(record)
        print(f"written to {options.output}")
    mesh.close()


if __name__ == "__main__":
    main()
