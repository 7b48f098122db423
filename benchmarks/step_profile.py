"""Where the time of a training step goes: the share of each kind of operator on one device.

    python -m benchmarks.step_profile [--device cpu] [--preset small] [--optimizer]

A step is forward, loss, backward and, if asked for, the clipped AdamW step of training. Steps without and with
torch.profiler take turns, so that what the profiler costs is known. On CUDA the times are those of kernels, on a CPU
those of operators less the operators inside them, which the profiler makes a little longer.

The loss computes the gradients of the head in its forward: they count there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from benchmarks import harness, one_gpu, step_report, step_trace, tensor_parallel
from benchmarks.one_gpu_contenders import Kernels
from benchmarks.peers.plain import PlainLlamaConfig
from benchmarks.step_groups import RANGES
from tpformer import Llama, LlamaConfig, Mesh
from tpformer.parallel.data import GradientBuckets
from tpformer.random import Key
from tpformer.train.optimizer import Optimizer
from tpformer.train.schedule import OptimizerConfig

Step = Callable[[], object]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """Profile steps of one Llama on one device, and write a table, a record and a chart of where the time went."""

    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    """On a CPU every kernel is plain torch."""
    preset: Literal["small", "training", "1b", "8b-layers"] = "small"
    """small: seconds on a CPU; training: the shape of `make benchmark`; 1b and 8b-layers: those of one GPU."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Of weights and activations; by default bf16 on CUDA and fp32 on a CPU."""
    optimizer: bool = False
    """Gradients are summed in fp32 buckets, clipped and applied, as in training."""
    dropout: float = 0.0
    """On the embedding and on what each block adds to the residual stream."""
    backend: Kernels = "auto"
    """Of the fused ops: auto, which is Triton on CUDA, or torch."""
    rounds: int = 5
    """Steps with the profiler, and as many without it."""
    warmup: int = 2
    """Steps before those."""
    threads: int = 1
    """CPU threads."""
    seed: int = 0
    """Seed of the weights and of the batch."""
    results: Path = Path("benchmarks/results")
    """Where step_profile_<device>.json and .png are written."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype, chosen by the device if it was left open."""
        return DTYPES[self.dtype or ("bf16" if self.device == "cuda" else "fp32")]

    def shape(self) -> tuple[LlamaConfig, int]:
        """The model and the batch; every sequence is as long as the model allows."""
        if self.preset == "small":
            config, batch = PlainLlamaConfig(4096, 256, 2, 4, 2, 704, 256), 2
        elif self.preset == "training":
            shape = tensor_parallel.Options()
            config, batch = PlainLlamaConfig(**shape.shape()), shape.batch
        else:
            config, batch = one_gpu.preset(self.preset)
        return replace(LlamaConfig(**asdict(config)), dropout=self.dropout, backend=self.backend), batch


@dataclass(frozen=True)
class Measured:
    """What the rounds gave: the profiled steps' pieces, and the seconds of every step."""

    pieces: list[step_trace.Piece]
    seconds: list[float]
    """Without the profiler."""
    profiled_seconds: list[float]


def build(options: Options, device: torch.device) -> Step:
    """A model, its batch and maybe its optimizer, as a step whose parts have names in a trace."""
    config, batch = options.shape()
    mesh = Mesh(device=device)
    model = Llama(config, mesh, seed=options.seed)
    optimizer = Optimizer(model, mesh, OptimizerConfig(), options.torch_dtype) if options.optimizer else None
    model.to(options.torch_dtype)
    buckets = GradientBuckets(model, mesh) if optimizer else None
    tokens, targets = harness.random_text(config.vocab_size, batch, config.max_seq_len, options.seed, device)
    key = Key(options.seed) if options.dropout else None

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with record_function(RANGES["forward"]):
            loss = model.loss(tokens, targets, key=key)
        if buckets is not None:
            buckets.start(last=True)
        with record_function(RANGES["backward"]):
            loss.backward()
        if optimizer is not None and buckets is not None:
            with record_function(RANGES["optimizer"]):
                optimizer.step(buckets.finish(), 1e-5, loss.detach())

    return step


def profiled(step: Step, device: torch.device) -> tuple[list[step_trace.Piece], float]:
    """One step under the profiler: its pieces, and its seconds by the same clock as without."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        seconds = harness.seconds_alone(step, device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return step_trace.pieces(step_trace.read(path), on_cuda), seconds


def measure(step: Step, device: torch.device, rounds: int, warmup: int) -> Measured:
    """Steps without and with the profiler in turn, after some that warm both up."""
    for _ in range(warmup):
        step()
    profiled(step, device)  # the profiler's own first start is slow
    measured = Measured([], [], [])
    for _ in tqdm(range(rounds), desc="rounds", unit="round"):
        measured.seconds.append(harness.seconds_alone(step, device))
        found, seconds = profiled(step, device)
        measured.pieces.extend(found)
        measured.profiled_seconds.append(seconds)
    return measured


def record(options: Options, measured: Measured, device: torch.device) -> dict[str, Any]:
    """Everything that is known of the step, as plain values."""
    config, batch = options.shape()
    rounds = len(measured.seconds)
    groups = step_report.groups(measured.pieces, rounds)
    median, with_profiler = (
        harness.Timing.of([harness.Sample(s, None) for s in seconds]).median_ms
        for seconds in (measured.seconds, measured.profiled_seconds)
    )
    busy = sum(row["ms"] for row in groups)
    return {
        "schema_version": 1,
        "benchmark": "step_profile",
        "preset": options.preset,
        "config": asdict(config) | {"batch": batch, "rounds": rounds, "warmup": options.warmup},
        "dtype": str(options.torch_dtype).removeprefix("torch."),
        "optimizer": options.optimizer,
        "seed": options.seed,
        "environment": harness.environment("benchmarks.step_profile", device),
        "parameters": config.num_parameters(),
        "times_are": "mean of kernels" if device.type == "cuda" else "mean of operators, less the operators inside",
        "step_ms": median,
        "profiled_step_ms": with_profiler,
        "busy_ms": busy,
        "idle_ms": median - busy if device.type == "cuda" else None,
        "samples_ms": [1e3 * seconds for seconds in measured.seconds],
        "profiled_samples_ms": [1e3 * seconds for seconds in measured.profiled_seconds],
        "groups": groups,
    }


def main() -> None:
    """Read the flags, then measure, print and write."""
    options = tyro.cli(Options, prog="benchmarks.step_profile")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU, and torch sees none here")
    torch.set_num_threads(options.threads)
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    measured = measure(build(options, device), device, options.rounds, options.warmup)
    step_report.write(options.results / f"step_profile_{options.device}", record(options, measured, device))


if __name__ == "__main__":
    main()
