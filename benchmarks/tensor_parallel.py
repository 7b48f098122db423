"""Forward + backward of one Llama in plain PyTorch, in DTensor and in tpformer, side by side on several ranks.

A step is zero_grad(set_to_none=True), forward, loss, backward; no optimizer. All variants hold the same
weights, are checked to agree before the clock starts, stay alive, and are stepped in turn, so that a slow
minute of the machine falls on all of them. A step takes as long as its slowest rank; ranks outside it sleep.

Peak memory is measured apart: each variant alone, in fresh processes, during its second step. On a CPU it is
the resident size of the whole process, interpreter and torch included; on CUDA what torch has allocated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.peers import dtensor
from benchmarks.peers.plain import PlainLlama, PlainLlamaConfig, load_from_tpformer
from benchmarks.tensor_parallel_report import comparisons, print_table
from tpformer import Llama, LlamaConfig, Mesh, full_parameter
from tpformer.doctor.facts import cpu_matmul


@dataclass(frozen=True)
class Options:
    """Time forward + backward of one Llama in plain PyTorch, DTensor and tpformer. Run it under torchrun.

    One GPU needs no torchrun, and has flags of its own: see --device cuda --help.
    """

    hidden: int = 1024
    """Width of the model."""
    layers: int = 4
    """Number of decoder layers."""
    heads: int = 16
    """Query heads."""
    kv_heads: int = 8
    """Key and value heads."""
    ffn: int = 2816
    """Inner width of the MLP."""
    vocab: int = 32000
    """Vocabulary size; embedding and head are not tied."""
    seq: int = 512
    """Tokens per sequence."""
    batch: int = 2
    """Sequences per step."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What weights and activations are."""
    rounds: int = 7
    """Timed steps of each variant."""
    warmup: int = 2
    """Untimed steps of each variant, besides the one that checks agreement."""
    threads: int = 1
    """CPU threads of each rank."""
    seed: int = 0
    """Seed of the weights and of the batch."""
    memory: bool = True
    """Measure peak memory too, each variant alone in fresh processes."""
    output: Path | None = None
    """Where the record is written; by default benchmarks/results/training_cpu.json, or training_cpu_bf16.json."""

    def record_path(self) -> Path:
        """The file of the record."""
        suffix = "" if self.dtype == "float32" else "_bf16"
        return self.output or Path(f"benchmarks/results/training_cpu{suffix}.json")

    def shape(self) -> dict[str, Any]:
        """The fields that PlainLlamaConfig and LlamaConfig share."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_layers": self.layers,
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "ffn_hidden_size": self.ffn,
            "max_seq_len": self.seq,
        }

    def data(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random tokens and their targets, each (batch, seq), the same on every rank."""
        return harness.random_text(self.vocab, self.batch, self.seq, self.seed, device)


class LanguageModel(Protocol):
    """What the plain and the tpformer Llama have in common."""

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per token."""


@dataclass(frozen=True)
class Variant:
    """One way to run the model, as this rank sees it: without model and step if the rank takes no part."""

    kind: str
    tp: int
    model: nn.Module | None
    step: Callable[[], Tensor] | None

    @property
    def name(self) -> str:
        """How the table calls it."""
        return f"{self.kind} tp={self.tp}"


def forward_backward(model: LanguageModel, tokens: Tensor, targets: Tensor) -> Tensor:
    """Loss of (b, s) tokens, with gradients left in the parameters; a detached scalar."""
    loss = model.loss(tokens, targets)
    loss.backward()
    return loss.detach()


def initial_weights(options: Options, device: torch.device) -> dict[str, Tensor]:
    """Every parameter of tpformer's model, whole, by its name there; all variants start from these."""
    model = Llama(LlamaConfig(**options.shape()), Mesh(device=device), seed=options.seed)
    return {name: full_parameter(model, name).detach() for name, _ in model.named_parameters()}


def plain_model(options: Options, device: torch.device, weights: dict[str, Tensor] | None) -> PlainLlama:
    """The plain Llama, with torch's own initialisation if no weights are given."""
    model = PlainLlama(PlainLlamaConfig(**options.shape()))
    if weights is not None:
        load_from_tpformer(model, weights)
    return model.to(device)


def build(
    kind: str, tp: int, options: Options, device: torch.device, weights: dict[str, Tensor] | None = None
) -> Variant:
    """Build one variant on the first `tp` ranks; every rank of the job calls it, in the same order."""
    tokens, targets = options.data(device)
    run: Callable[..., Tensor] = dtensor.forward_backward if kind == "DTensor" else forward_backward
    device_mesh = dtensor.one_axis_mesh(device, tp) if kind == "DTensor" else None
    if dist.get_rank() >= tp:
        return Variant(kind, tp, None, None)
    model: nn.Module
    if kind == "tpformer":
        mesh = Mesh(device=device) if tp == 1 else Mesh.create(tp=tp)
        model = Llama(LlamaConfig(**options.shape()), mesh, seed=options.seed).to(getattr(torch, options.dtype))
    else:
        plain = plain_model(options, device, weights).to(getattr(torch, options.dtype))
        model = plain if device_mesh is None else dtensor.parallelize(plain, device_mesh)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        return run(model, tokens, targets)

    return Variant(kind, tp, model, step)


def contenders(world_size: int) -> list[tuple[str, int]]:
    """Kind and tensor-parallel degree of every variant, the reference first."""
    degrees = sorted({1, world_size})
    return [("plain", 1), *(("DTensor", tp) for tp in degrees), *(("tpformer", tp) for tp in degrees)]


AGREEMENT = {"float32": (1e-5, 1e-5), "bfloat16": (2e-3, 5e-2)}
"""How far, relatively, the loss and the first norm's gradient may lie apart: some ten times what rounding does."""


def check_agreement(variants: list[Variant], dtype: str) -> dict[str, float]:
    """Step every variant once; raises RuntimeError on rank 0 if one is not the same model as the first.

    Compared are the loss and the first norm's gradient: it has passed every layer, and no rank's is a part.
    """
    loss_bound, gradient_bound = AGREEMENT[dtype]
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for variant in variants:
        if variant.step is not None and variant.model is not None:
            loss = variant.step()
            gradient = variant.model.get_parameter("blocks.0.attention_norm.weight").grad
            if gradient is None:
                raise RuntimeError(f"{variant.name} leaves no gradient in its first norm")
            seen[variant.name] = loss, gradient.clone()
    if dist.get_rank() == 0:
        loss, gradient = seen[variants[0].name]
        for name, (other_loss, other_gradient) in seen.items():
            loss_error = float((other_loss - loss).abs() / loss.abs())
            gradient_error = float((other_gradient - gradient).norm() / gradient.norm())
            # In fp32 the order of summation alone moves them by about 1e-7 and 2e-6.
            if not (loss_error < loss_bound and gradient_error < gradient_bound):
                raise RuntimeError(
                    f"{name} is not the model of {variants[0].name}: the loss is off by {loss_error:.1e} "
                    f"(at most {loss_bound:.0e}), the first norm's gradient by {gradient_error:.1e} "
                    f"(at most {gradient_bound:.0e})"
                )
    return {name: float(loss) for name, (loss, _) in seen.items()}


def peak_alone(kind: str, tp: int, options: Options, rank: int, store: str, device: torch.device) -> int | None:
    """Peak bytes of one rank of one variant; runs in a fresh process, together with the other ranks'."""
    torch.set_num_threads(options.threads)
    harness.join_group(store, rank, tp, device)
    variant = build(kind, tp, options, device)
    peak = None if variant.step is None else harness.peak_of_second(variant.step, device)
    dist.destroy_process_group()
    return peak


def measure_memory(kind: str, tp: int, options: Options, device: torch.device) -> list[int | None]:
    """Peak bytes of each rank of one variant that runs alone; collective, the same list on every rank."""
    rank = dist.get_rank()
    with tempfile.TemporaryDirectory() as folder:
        stores = [str(Path(folder) / "store")]
        dist.broadcast_object_list(stores, src=0)
        peak = None
        if rank < tp:
            peak = harness.in_fresh_process(peak_alone, kind, tp, options, rank, stores[0], device)
        peaks: list[int | None] = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, peak)  # also keeps rank 0's folder until all have left it
    return peaks[:tp]


def result_row(variant: Variant, samples: list[harness.Sample], plain_ms: float) -> dict[str, Any]:
    """One variant's numbers for the record; efficiency is plain's time over tp times this one's."""
    timing = harness.Timing.of(samples)
    return {
        "name": variant.name,
        "kind": variant.kind,
        "tp": variant.tp,
        **asdict(timing),
        "ratio_to_plain": timing.median_ms / plain_ms,
        "efficiency": plain_ms / (variant.tp * timing.median_ms),
        "samples": [asdict(sample) for sample in samples],
    }


def measure(options: Options, device: torch.device) -> dict[str, Any]:
    """Check, time and weigh every variant; collective, only rank 0's record is complete."""
    pairs = contenders(dist.get_world_size())
    # Before anything else is built, so that no idle rank holds memory the measured processes need.
    peaks = [measure_memory(kind, tp, options, device) if options.memory else [] for kind, tp in pairs]
    weights = initial_weights(options, device)
    variants = [build(kind, tp, options, device, weights) for kind, tp in pairs]
    del weights
    losses = check_agreement(variants, options.dtype)
    steps: dict[str, harness.Step | None] = {variant.name: variant.step for variant in variants}
    harness.run_rounds(steps, options.warmup, device, "warm-up")
    samples = harness.run_rounds(steps, options.rounds, device, "round")
    plain_ms = harness.Timing.of(samples["plain tp=1"]).median_ms
    rows = [
        result_row(variant, samples[variant.name], plain_ms)
        | {"loss": losses.get(variant.name), "peak_memory_bytes": peak}
        for variant, peak in zip(variants, peaks, strict=True)
    ]
    whole_process = "resident memory of the whole process, torch included"
    return {
        "schema_version": 1,
        "benchmark": "training",
        "config": {key: value for key, value in asdict(options).items() if key != "output"},
        "environment": harness.environment("benchmarks.training", device),
        "quiet_below_cores": harness.QUIET_CORES,
        "cpu_matmul": cpu_matmul(),
        "peak_memory_is": "torch.cuda.max_memory_allocated" if device.type == "cuda" else whole_process,
        "variants": rows,
        "ratios": comparisons(rows),
    }


def run(arguments: list[str], device: str | None) -> None:
    """Read the flags, measure, print and write; the process group is the one torchrun describes."""
    options = tyro.cli(Options, prog="benchmarks.training", args=arguments)
    torch.set_num_threads(options.threads)
    mesh = Mesh.create(device=device)
    if not dist.is_initialized():
        raise SystemExit("start it with: torchrun --nproc-per-node 2 -m benchmarks.training, or add --device cuda")
    record = measure(options, mesh.device)
    if dist.get_rank() == 0:
        harness.write_json(options.record_path(), record)
        print_table(record)
        print(f"written to {options.record_path()}")
    mesh.close()
