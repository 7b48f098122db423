"""Forward + backward of one Llama on one GPU: tpformer beside plain torch, transformers and Liger, in one process.

All contenders hold the same weights, are checked to agree before the clock starts, stay alive, and are stepped
in turn. One that fails is listed with its reason; the others go on. A step starts without gradients and makes
them: forward, loss, backward; no optimizer.

Peak memory is the most that torch has allocated during a contender's third step, less what was allocated before
it was built: its weights, gradients and activations, and nobody else's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torch._dynamo.utils import counters
from tqdm import tqdm

from benchmarks import harness, one_gpu_report
from benchmarks.one_gpu_contenders import (
    Builder,
    Compiler,
    Contender,
    Setting,
    Weights,
    all_contenders,
    initial_weights,
)
from benchmarks.peers.plain import PlainLlamaConfig
from tpformer.train.log import peak_flops

# Of the loss and of the first norm's gradient, relative. Untrained, a model's loss is near ln(vocabulary) whatever
# its weights are; the gradient is off by 1.4 with other weights, by 0.04 to 0.11 with gate and up swapped in one
# layer, and by rounding alone 0.02 in bf16 and 1e-6 in fp32.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-3, 0.05)}


@dataclass(frozen=True)
class Options:
    """Time forward + backward of one Llama on one GPU, in bf16: tpformer, plain torch, transformers and Liger."""

    preset: Literal["both", "1b", "8b-layers"] = "both"
    """1b: Llama 3.2 1B with an untied head, 2 x 4096 tokens; 8b-layers: 4 layers of Llama 3 8B, 1 x 8192."""
    rounds: int = 20
    """Timed steps of each contender."""
    warmup: int = 3
    """Untimed steps of each contender, in turn, besides the three that check and weigh it."""
    compiler: Compiler = "inductor"
    """What torch.compile uses; none leaves the compiled contenders out."""
    seed: int = 0
    """Seed of the weights and of the batch."""
    results: Path = Path("benchmarks/results")
    """Where training_cuda_<preset>.json and .png are written."""


@dataclass
class Entry:
    """A contender's way through the comparison: alive, or failed for a reason."""

    name: str
    contender: Contender | None = None
    failure: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)

    def attempt(self, work: Callable[[], None]) -> None:
        """Do `work` unless the contender has failed before; if it raises, that is the reason."""
        if self.failure is not None:
            return
        try:
            work()
        except Exception as error:  # whatever a framework raises: the others must go on
            first = next(iter(str(error).strip().splitlines()), "")
            self.failure = f"{type(error).__name__}: {first}"
            self.contender = None  # its memory is the others'

    def insist(self) -> None:
        """Raise RuntimeError if this one, with which the others are compared, has failed."""
        if self.failure is not None:
            raise RuntimeError(f"{self.name}, with which the others are compared, failed: {self.failure}")

    @property
    def timing(self) -> harness.Timing:
        """Its samples in brief; there must be one at least."""
        return harness.Timing.of([harness.Sample(seconds, None) for seconds in self.samples])


def preset(name: str) -> tuple[PlainLlamaConfig, int]:
    """Shape and batch of a preset."""
    shapes = {"1b": (2048, 16, 32, 8, 8192, 4096), "8b-layers": (4096, 4, 32, 8, 14336, 8192)}
    hidden, layers, heads, kv_heads, ffn, seq = shapes[name]
    return PlainLlamaConfig(128256, hidden, layers, heads, kv_heads, ffn, seq, rope_theta=500000.0), 8192 // seq


def allocated(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def matmul_flops(setting: Setting) -> tuple[int, float]:
    """Side of a large square matrix product, and the FLOP/s that torch.mm reaches on it."""
    device = setting.device
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device).to(setting.dtype) for _ in range(2))
    out = torch.empty_like(a)

    def ten() -> None:
        for _ in range(10):
            torch.mm(a, b, out=out)

    seconds = [harness.seconds_alone(ten, device) for _ in range(8)][3:]
    return side, 10 * 2 * side**3 / sorted(seconds)[2]


def admit(entry: Entry, build: Builder, setting: Setting, weights: Weights, reference: Entry) -> None:
    """Build a contender, compare a step of it with the reference's, and weigh its third."""
    tokens, targets = text(setting)
    harness.release_memory(setting.device)
    before = allocated(setting.device)
    counters.clear()
    entry.contender = contender = build(setting, weights)
    loss, gradient = contender.step(tokens, targets), contender.first_norm.grad
    if gradient is None:
        raise RuntimeError("it leaves no gradient in its first norm")
    entry.facts |= {"loss": float(loss), "graph_breaks": sum(counters["graph_break"].values())}
    entry.facts["gradient"] = gradient.detach().double().cpu()
    compare(entry.facts, reference.facts, TOLERANCES[setting.dtype])
    if setting.device.type == "cuda":
        peak = harness.peak_of_second(lambda: contender.step(tokens, targets), setting.device)
        entry.facts["peak_memory_bytes"] = None if peak is None else peak - before
    contender.model.zero_grad(set_to_none=True)


def compare(facts: dict[str, Any], reference: dict[str, Any], tolerances: tuple[float, float]) -> None:
    """Add how far loss and gradient are from the reference's; raises RuntimeError if it is another model."""
    loss, gradient = reference["loss"], reference["gradient"]
    facts["loss_error"] = abs(facts["loss"] - loss) / abs(loss)
    facts["gradient_error"] = float((facts["gradient"] - gradient).norm() / gradient.norm())
    if not (facts["loss_error"] < tolerances[0] and facts["gradient_error"] < tolerances[1]):
        raise RuntimeError(
            f"not the same model: loss off by {facts['loss_error']:.0e}, gradient by {facts['gradient_error']:.0e}"
        )


def text(setting: Setting) -> tuple[Tensor, Tensor]:
    """The one batch: tokens and targets, each (b, s)."""
    c = setting.config
    return harness.random_text(c.vocab_size, setting.batch, c.max_seq_len, setting.seed, setting.device)


def run_rounds(entries: list[Entry], rounds: int, setting: Setting, label: str) -> None:
    """Step every contender that is alive once a round, backwards on odd rounds; its seconds go to its samples."""
    tokens, targets = text(setting)

    def timed(entry: Entry) -> None:
        assert entry.contender is not None
        contender = entry.contender
        entry.samples.append(harness.seconds_alone(lambda: contender.step(tokens, targets), setting.device))
        contender.model.zero_grad(set_to_none=True)  # outside the clock: the next one needs the memory

    for index in tqdm(range(rounds), desc=label, unit="round"):
        for entry in entries if index % 2 == 0 else reversed(entries):
            entry.attempt(partial(timed, entry))


def measure(setting: Setting, builders: dict[str, Builder], rounds: int, warmup: int) -> list[Entry]:
    """Build, check, weigh and time every contender; the first is the reference of the others.

    Raises RuntimeError if the reference itself fails.
    """
    weights = initial_weights(setting)
    entries = [Entry(name) for name in builders]
    for entry in (bar := tqdm(entries, desc="build and check", unit="contender")):
        bar.set_postfix_str(entry.name)
        entry.attempt(partial(admit, entry, builders[entry.name], setting, weights, entries[0]))
        entries[0].insist()
    del weights
    harness.release_memory(setting.device)
    run_rounds(entries, warmup, setting, "warm-up")
    for entry in entries:
        entry.samples.clear()
    run_rounds(entries, rounds, setting, "rounds")
    entries[0].insist()
    return entries


def row(entry: Entry, plain_ms: float, setting: Setting, rates: dict[str, float | None]) -> dict[str, Any]:
    """One contender's numbers for the record: times, tokens/s, MFU of each rate, memory; or why there are none."""
    facts = {key: value for key, value in entry.facts.items() if key != "gradient"}
    if entry.failure is not None:
        return {"name": entry.name, "failure": entry.failure} | facts
    timing = entry.timing
    per_second = 1e3 * setting.tokens / timing.median_ms
    flops = per_second * setting.tpformer_config().flops_per_token(setting.config.max_seq_len)
    return {
        "name": entry.name,
        "failure": None,
        "median_ms": timing.median_ms,
        "p20_ms": timing.p20_ms,
        "p80_ms": timing.p80_ms,
        "ratio_to_plain": timing.median_ms / plain_ms,
        "tokens_per_second": per_second,
        "mfu": {name: None if rate is None else flops / rate for name, rate in rates.items()},
        "peak_memory_bytes": None,
        "samples_ms": [1e3 * seconds for seconds in entry.samples],
    } | facts


def versions() -> dict[str, str | None]:
    """The installed packages that the contenders come from."""

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {name: of(name) for name in ("transformers", "liger-kernel", "triton")} | {"cuda": torch.version.cuda}


def compare_all(setting: Setting, builders: dict[str, Builder], rounds: int, warmup: int) -> dict[str, Any]:
    """The whole comparison as a record; `builders` are the contenders by name, the reference first."""
    side, before = matmul_flops(setting)
    entries = measure(setting, builders, rounds, warmup)
    rates = {"matmul": max(before, matmul_flops(setting)[1]), "datasheet": peak_flops(setting.device)}
    config = setting.tpformer_config()
    return {
        "schema_version": 1,
        "benchmark": "training_one_gpu",
        "config": asdict(setting.config) | {"batch": setting.batch, "rounds": rounds, "warmup": warmup},
        "dtype": str(setting.dtype).removeprefix("torch."),
        "compiler": setting.compiler,
        "seed": setting.seed,
        "environment": harness.environment("benchmarks.training", setting.device) | {"packages": versions()},
        "parameters": config.num_parameters(),
        "flops_per_token": config.flops_per_token(setting.config.max_seq_len),
        "flops_are": "6 a token and matmul weight, 12 layers · heads · head_dim · length: causality not counted",
        "flops_per_second": rates | {"matmul_side": side},
        "peak_memory_is": "torch.cuda.max_memory_allocated, less what was allocated before the contender was built",
        "tolerances": dict(zip(("loss", "gradient"), TOLERANCES[setting.dtype], strict=True)),
        "contenders": [row(entry, entries[0].timing.median_ms, setting, rates) for entry in entries],
    }


def run(arguments: list[str]) -> None:
    """Read the flags, then measure, print and write each preset."""
    options = tyro.cli(Options, prog="benchmarks.training --device cuda", args=arguments)
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU, and torch sees none here")
    for name in ("1b", "8b-layers") if options.preset == "both" else (options.preset,):
        config, batch = preset(name)
        device = torch.device("cuda", torch.cuda.current_device())
        setting = Setting(config, batch, device, torch.bfloat16, options.compiler, options.seed)
        record = compare_all(setting, all_contenders(), options.rounds, options.warmup) | {"preset": name}
        one_gpu_report.write(options.results / f"training_cuda_{name}", record)
        torch.compiler.reset()  # it holds on to the models
