"""How long a save stalls training, beside safetensors' own synchronous write of the same bytes to the same disk.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.checkpoint

The state is a Llama's weights and both moments in fp32, split over tp. Each round does every way once: a save in the
background (its stall; a stretch of work while it is written; the rest of it), the same at once, `save_file` of each
rank's own tensors to a file of its own (and its fsync, which a save has too), and reading back. Before the clock
starts a checkpoint must give back every number bit for bit.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Sample, Timing
from tpformer import Llama, LlamaConfig, Mesh, placements
from tpformer.checkpoint.background import Checkpoints
from tpformer.checkpoint.store import Retention, latest_checkpoint, load_checkpoint
from tpformer.train.state import documents, parts_of


@dataclass(frozen=True)
class Options:
    """Measure the stall of a save beside a synchronous write of the same bytes."""

    hidden: int = 1024
    """Width of the model."""
    layers: int = 2
    """Number of decoder layers."""
    vocab: int = 4096
    """Vocabulary size; embedding and head are not tied."""
    rounds: int = 7
    """Saves of each kind."""
    matmuls: int = 60
    """Products of two 768 x 768 matrices in the stretch of work."""
    directory: Path | None = None
    """On the disk to write to; by default the system's temporary one."""
    output: Path = Path("benchmarks/results/checkpoint_cpu.json")
    """Where the record is written."""


class Ways:
    """The state of this rank, and each way to write and read it."""

    def __init__(self, options: Options, mesh: Mesh, directory: Path):
        config = LlamaConfig(
            vocab_size=options.vocab,
            hidden_size=options.hidden,
            num_layers=options.layers,
            num_heads=options.hidden // 64,
            ffn_hidden_size=options.hidden * 11 // 4,
        )
        model = Llama(config, mesh, seed=0)
        weights = {name: p.detach() for name, p in model.named_parameters()}
        self.state = {
            f"{kind}/{name}": p * factor
            for kind, factor in (("weight", 1.0), ("exp_avg", 0.1), ("exp_avg_sq", 0.01))
            for name, p in weights.items()
        }
        self.mesh, self.directory, self.config, self.known = mesh, directory, config, placements(model, mesh)
        self.background = Checkpoints(directory / "background", mesh, Retention(1))
        self.at_once = Checkpoints(directory / "at once", mesh, Retention(1), background=False)
        self.file = directory / f"rank_{mesh.world.rank}.safetensors"
        self.work = torch.ones(768, 768), options.matmuls
        self.step = 0

    @property
    def bytes(self) -> int:
        """This rank's."""
        return sum(x.nbytes for x in self.state.values())

    def save(self, checkpoints: Checkpoints) -> None:
        """Save the state as it is."""
        self.step += 1
        checkpoints.save(self.step, parts_of(self.state, self.known, self.config), documents(self.config, {}))

    def multiply(self) -> None:
        """Work that needs the processor."""
        x, count = self.work
        for _ in range(count):
            torch.mm(x, x)

    def save_file(self) -> None:
        """The same bytes by safetensors, a file for each rank."""
        save_file({name: x.contiguous() for name, x in self.state.items()}, self.file)

    def sync_file(self) -> None:
        """Have that file on the disk."""
        descriptor = os.open(self.file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def remove(self) -> None:
        """Let go of what is there, so that every way makes new files; on every rank."""
        self.file.unlink(missing_ok=True)
        dist.barrier()
        if self.mesh.world.rank == 0:
            shutil.rmtree(self.directory / "at once", ignore_errors=True)

    def load(self) -> dict[str, Tensor]:
        """Read the latest checkpoint, checksums included."""
        path = latest_checkpoint(self.directory / "background")
        assert path is not None
        found = {name: torch.empty_like(x) for name, x in self.state.items()}
        load_checkpoint(path, parts_of(found, self.known, self.config), self.mesh.world)
        return found

    def check(self) -> None:
        """Raises RuntimeError if a checkpoint does not give back what was saved."""
        self.save(self.background)
        self.background.wait()
        found = self.load()
        wrong = [name for name, x in self.state.items() if not torch.equal(x, found[name])]
        if wrong:
            raise RuntimeError(f"{', '.join(wrong)} came back with other numbers")


def measure(ways: Ways, rounds: int) -> dict[str, list[Sample]]:
    """Every way once a round, backwards on odd rounds."""
    groups: list[list[tuple[str, Callable[[], object]]]] = [
        [
            ("stall", lambda: ways.save(ways.background)),
            ("work while writing", ways.multiply),
            ("rest of the writing", ways.background.wait),
        ],
        [("work alone", ways.multiply)],
        [("save at once", lambda: ways.save(ways.at_once))],
        [("save_file", ways.save_file), ("its fsync", ways.sync_file)],
        [("load", ways.load)],
    ]
    samples: dict[str, list[Sample]] = {name: [] for group in groups for name, _ in group}
    for index in range(rounds):
        for group in groups if index % 2 == 0 else reversed(groups):
            ways.remove()
            for name, step in group:
                samples[name].append(harness.timed_step(step, ways.mesh.device))
        if dist.get_rank() == 0:
            print(f"round {index + 1}: " + "  ".join(f"{n} {1e3 * s[-1].seconds:.0f}" for n, s in samples.items()))
    return samples


def table(timings: dict[str, Timing], count: int) -> str:
    """Milliseconds, and what that is a second."""
    lines = [f"{count / 2**20:.0f} MiB a rank; milliseconds of the slowest rank, median (20th to 80th percentile)"]
    for name, t in timings.items():
        lines.append(f"{name:20} {t.median_ms:8.1f}  ({t.p20_ms:.1f} to {t.p80_ms:.1f})")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and record."""
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    mesh = Mesh.create(tp=int(os.environ.get("WORLD_SIZE", "1")), device="cpu")
    place = [tempfile.mkdtemp(dir=options.directory) if mesh.world.rank == 0 else ""]
    dist.broadcast_object_list(place)
    directory = Path(place[0])
    try:
        ways = Ways(options, mesh, directory)
        ways.check()
        timings = {name: Timing.of(found) for name, found in measure(ways, options.rounds).items()}
        if mesh.world.rank == 0:
            report(options, ways, timings)
    finally:
        dist.barrier()
        if mesh.world.rank == 0:
            shutil.rmtree(directory)
        mesh.close()


def report(options: Options, ways: Ways, timings: dict[str, Timing]) -> None:
    """On one rank: the table, the ratios and the record."""
    ms = {name: timing.median_ms for name, timing in timings.items()}
    slower = ms["work while writing"] - ms["work alone"]
    ratios: dict[str, Any] = {
        "stall / save_file without fsync": ms["stall"] / ms["save_file"],
        "stall / save_file with fsync": ms["stall"] / (ms["save_file"] + ms["its fsync"]),
        "stall and slower work / save_file with fsync": (ms["stall"] + slower) / (ms["save_file"] + ms["its fsync"]),
    }
    print(table(timings, ways.bytes))
    print("\n".join(f"{name}: {ratio:.2f}" for name, ratio in ratios.items()))
    asked = asdict(options)
    record = {
        "options": {name: value for name, value in asked.items() if not isinstance(value, Path | None)},
        "bytes_per_rank": ways.bytes,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "ratios": ratios,
        "environment": harness.environment("benchmarks.checkpoint", ways.mesh.device),
    }
    harness.write_json(options.output, record)


if __name__ == "__main__":
    main()
