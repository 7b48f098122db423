"""What recomputation and offload cost and save: peak activations and step time of a Llama, each against none.

    python -m benchmarks.memory

One process, forward + backward into gradient buckets, no optimizer. All ways share one model's weights; before the
clock starts each must give the loss and gradients of none, bit for bit. They are stepped in turn, so that a slow
minute of the machine falls on all of them. Activations are the peak of all that a step makes and drops. On a CPU what
is offloaded counts as another memory's, and how fast it travels there is a CPU's copy: only CUDA shows a real one.
"""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from benchmarks import harness
from benchmarks.harness import Step
from tpformer import Llama, LlamaConfig, Mesh
from tpformer.parallel.data import GradientBuckets
from tpformer.parallel.offload import ActivationOffload
from tpformer.parallel.recompute import apply_recompute
from tpformer.parallel_config import ParallelConfig
from tpformer.train.memory import measure_memory


@dataclass(frozen=True)
class Options:
    """Measure activation memory and step time of each way to save it."""

    hidden: int = 512
    """Width of the model."""
    layers: int = 8
    """Number of decoder layers."""
    heads: int = 8
    """Query heads, and key and value heads."""
    ffn: int = 1408
    """Inner width of the MLP."""
    vocab: int = 4096
    """Vocabulary size; embedding and head are not tied."""
    seq: int = 512
    """Tokens per sequence."""
    batch: int = 1
    """Sequences per step."""
    rounds: int = 5
    """Timed steps of each way."""
    seed: int = 0
    """Seed of the weights and of the batch."""
    device: str = "cpu"
    """cpu or cuda."""
    output: Path | None = None
    """Where the record is written; by default benchmarks/results/memory_<device>.json."""


def selective(*modules: str) -> ParallelConfig:
    """Recompute these modules of every block."""
    return ParallelConfig(recompute="selective", recompute_modules=modules)


WAYS = {
    "none": ParallelConfig(),
    "full": ParallelConfig(recompute="full"),
    "full, every 2nd block": ParallelConfig(recompute="full", recompute_every=2),
    "attention.core": selective("attention.core"),
    "attention.core, mlp": selective("attention.core", "mlp"),
    "offload": ParallelConfig(offload_activations=True),
    "full + offload": ParallelConfig(recompute="full", offload_activations=True),
}


class Contender:
    """One way to run the step; weights and gradients are shared with the others'."""

    def __init__(self, base: Llama, config: ParallelConfig, buckets: GradientBuckets, batch: tuple[Tensor, Tensor]):
        self.model: Llama = copy.deepcopy(base, {id(p): p for p in base.parameters()})  # not of the weights
        apply_recompute(self.model, config)
        self.offload = ActivationOffload(base.mesh.device) if config.offload_activations else None
        self.buckets, self.batch = buckets, batch
        self.host_peak = 0
        """The most bytes of activations in host memory, at the end of forward."""

    def step(self) -> dict[str, Tensor]:
        """The loss, and the gradient of every parameter until the next step."""
        with self.offload or nullcontext():
            loss = self.model.loss(*self.batch)
        self.host_peak = self.offload.host_bytes if self.offload else 0
        self.buckets.start(last=True)
        loss.backward()
        return self.buckets.finish() | {"loss": loss.detach()}

    def weigh(self) -> tuple[int, dict[str, Tensor]]:
        """Peak bytes of a step's activations, and what the step gives."""
        with measure_memory(
            self.model.mesh.device, elsewhere=lambda: self.offload.host_bytes if self.offload else 0
        ) as memory:
            results = self.step()
        return memory.bytes, results


def build(options: Options, device: torch.device) -> dict[str, Contender]:
    """Every way, by name."""
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        num_layers=options.layers,
        num_heads=options.heads,
        ffn_hidden_size=options.ffn,
        max_seq_len=options.seq,
    )
    base = Llama(config, Mesh(device=device), seed=options.seed)
    buckets = GradientBuckets(base, base.mesh)
    batch = harness.random_text(options.vocab, options.batch, options.seq, options.seed, device)
    return {name: Contender(base, way, buckets, batch) for name, way in WAYS.items()}


def check_and_weigh(contenders: dict[str, Contender]) -> dict[str, int]:
    """Peak bytes of every way's activations; raises RuntimeError unless all compute the same."""
    expected = {name: x.clone() for name, x in contenders["none"].step().items()}
    peaks = {}
    for name, contender in tqdm(contenders.items(), desc="check", unit="way"):
        peaks[name], found = contender.weigh()
        wrong = [key for key, x in found.items() if not torch.equal(x, expected[key])]
        if wrong:
            raise RuntimeError(f"{name} is not the step of none: {', '.join(wrong[:3])} differ")
    return peaks


def run_rounds(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step, each once a round, backwards on odd rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in tqdm(range(rounds), desc="rounds", unit="round"):
        for name in steps if index % 2 == 0 else reversed(steps):
            seconds[name].append(step_seconds(steps[name], device))
    return seconds


def step_seconds(step: Step, device: torch.device) -> float:
    """Of the GPU; of a CPU what this process used of it, so that busy neighbours do not count."""
    if device.type == "cuda":
        return harness.seconds_alone(step, device)
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(options: Options, device: torch.device) -> dict[str, Any]:
    """Check, weigh and time every way; the record."""
    contenders = build(options, device)
    peaks = check_and_weigh(contenders)
    seconds = run_rounds({name: c.step for name, c in contenders.items()}, options.rounds, device)
    medians = {name: harness.Timing.of([harness.Sample(s, None) for s in seconds[name]]).median_ms for name in seconds}
    return {
        "schema_version": 1,
        "benchmark": "memory",
        "config": {key: value for key, value in asdict(options).items() if key != "output"},
        "environment": harness.environment("benchmarks.memory", device),
        "time_is": "between CUDA events" if device.type == "cuda" else "CPU time of the process, one thread",
        "ways": [
            {
                "name": name,
                "activation_bytes": peaks[name],
                "activations_to_none": peaks[name] / peaks["none"],
                "host_bytes": contenders[name].host_peak,
                "median_ms": medians[name],
                "time_to_none": medians[name] / medians["none"],
                "samples_ms": [1e3 * s for s in seconds[name]],
            }
            for name in contenders
        ],
    }


def print_table(record: dict[str, Any]) -> None:
    """The record as a table for the terminal."""
    print(f"\nforward + backward on {record['environment']['device']}; medians of {record['config']['rounds']} steps")
    print(f"time is {record['time_is']}; activations are the peak of what a step makes")
    print(f"{'way':24}{'activations MiB':>16}{'/ none':>8}{'on host MiB':>13}{'step ms':>10}{'/ none':>8}")
    for way in record["ways"]:
        print(
            f"{way['name']:24}{way['activation_bytes'] / 2**20:16.1f}{way['activations_to_none']:8.3f}"
            f"{way['host_bytes'] / 2**20:13.1f}{way['median_ms']:10.1f}{way['time_to_none']:8.3f}"
        )


def main() -> None:
    """Read the flags, measure, print and write."""
    options = tyro.cli(Options, prog="benchmarks.memory")
    torch.set_num_threads(1)
    device = torch.device(options.device)
    record = measure(options, device)
    path = options.output or Path(f"benchmarks/results/memory_{device.type}.json")
    harness.write_json(path, record)
    print_table(record)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
