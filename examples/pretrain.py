"""Pretrain a decoder: `torchrun --nproc-per-node 2 examples/pretrain.py --tp 2`, on CPUs (gloo) or GPUs (NCCL).

Every setting is a flag (`--help` lists them), and a TOML file can hold them (`--config`). What a run leaves:

    runs/<name>/config.toml  metrics.jsonl  loss.png  checkpoints/
"""

import os
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tpformer import Mesh
from tpformer.collectives import gather_stack, raise_together, together
from tpformer.train.config import TrainConfig
from tpformer.train.corpus import load_corpus
from tpformer.train.flags import find_run, parse_config, to_toml
from tpformer.train.lost_ranks import LostRankError, naming_lost_ranks
from tpformer.train.replicas import ReplicaDriftError
from tpformer.train.restart import remember_run, remembered_run
from tpformer.train.stop import Stopped, StopSignal
from tpformer.train.trainer import Trainer, TrainReport


def main(arguments: list[str]) -> int:
    """Run; the exit code. 0 as well where SIGTERM or SIGINT ended the run: it has saved itself."""
    # FSDP2 warns of what nothing here does: to change a block's output in place
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view tensor")
    world = Mesh.create()  # all processes as one axis, so that what goes wrong on one is heard of by all
    try:
        with naming_lost_ranks(world.world.rank, lambda: "not in a step"), StopSignal() as stop:
            return pretrain(go_on(arguments), world, stop)
    except LostRankError as error:  # each rank says its own; to leave in order would wait for the one that is lost
        print(f"pretrain.py: error: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def pretrain(arguments: list[str], world: Mesh, stop: StopSignal) -> int:
    """Prepare, train, and say what came of it."""
    try:
        config = together(lambda: parse_config(arguments, quiet=world.world.rank > 0), world.world)
        mesh = together(lambda: make_mesh(config), world.world)
        corpus = together(lambda: load_corpus(config.data, config.model.vocab_size, progress=chief(world)), world.world)
        directory = run_directory(config, world)
        trainer = together(lambda: Trainer(config, mesh, corpus, directory, stop), world.world)
        together(lambda: begin(trainer), world.world)
    except SystemExit as end:  # help, or flags of which tyro has already said what is wrong
        return int(end.code or 0)
    except (ValueError, OSError, ImportError) as error:
        complain(error, world)
        raise_together(None, world.world)  # nobody leaves, and has torchrun end the others, before this is printed
        return 2
    try:
        report = trainer.run()
    except Stopped as reason:
        if chief(world):
            print(reason, flush=True)
    except (FloatingPointError, ReplicaDriftError, OSError) as error:  # not finite, or a full disk: on every rank
        complain(error, world)
        return 1
    else:
        if chief(world):
            show(report, directory)
    world.close()
    return 0


def go_on(arguments: list[str]) -> list[str]:
    """The arguments; if torchrun has started this launch's workers again, those of going on with their run."""
    run = remembered_run()
    if run is None:
        return arguments
    resume = "--resume" if (run / "config.toml").exists() else "--no-resume"
    return [*arguments, resume, "--runs-dir", str(run.parent), "--name", run.name]


def chief(world: Mesh) -> bool:
    """Is this the one process that talks?"""
    return world.world.rank == 0


def complain(error: Exception, world: Mesh) -> None:
    """Print the one message."""
    if chief(world):
        print(f"pretrain.py: error: {error}", file=sys.stderr, flush=True)


def make_mesh(config: TrainConfig[Any]) -> Mesh:
    """The mesh that the flags ask for."""
    device = None if config.run.device == "auto" else config.run.device
    # the process group's own time-out is the second one: that of training says more
    return Mesh.of(config.parallel, device, timeout_seconds=config.run.timeout_seconds + 30)


def run_directory(config: TrainConfig[Any], world: Mesh) -> Path:
    """The directory of this run, the same on every rank; made here unless it is resumed."""
    runs, name = Path(config.run.runs_dir), config.run.name
    if config.run.resume:
        return together(lambda: find_run(runs, name), world.world)
    now = gather_stack(torch.tensor([time.time()], dtype=torch.float64, device=world.device), world.world)[0].item()
    directory = runs / (name or time.strftime("%Y%m%d-%H%M%S", time.localtime(now)))

    def make() -> None:
        if chief(world) and (directory / "config.toml").exists():
            raise ValueError(f"{directory} holds a run already: go on with --resume, or choose another --name")
        if chief(world):
            directory.mkdir(parents=True, exist_ok=True)

    together(make, world.world)
    return directory


def begin(trainer: Trainer) -> None:
    """Record the configuration and say what is about to be trained."""
    if not trainer.chief:
        return
    remember_run(trainer.directory)  # first: from here on the directory is this launch's
    config, directory, model = trainer.config, trainer.directory, trainer.model
    saved = replace(config, config="", run=replace(config.run, resume=False, name=directory.name))
    temporary = directory / ".config.toml.partial"
    temporary.write_text(to_toml(saved))
    os.replace(temporary, directory / "config.toml")
    mesh, corpus, layout = trainer.mesh, trainer.corpus, config.parallel
    print(
        f"{config.family}, {model.config.num_parameters():,} parameters, vocabulary {corpus.vocab_size:,}\n"
        f"tp {mesh.tp.size} x pp {mesh.pp.size} x dp {mesh.dp.size} on {mesh.device.type}, {layout.precision}"
        f"{', sequence parallel' if mesh.sequence_parallel else ''}"
        f"{f', {layout.pp_schedule}' if mesh.pp.size > 1 else ''}"
        f"{f', {layout.dp_mode}' if mesh.dp.size > 1 else ''}\n"
        f"{len(corpus.train):,} tokens to train on, {len(corpus.validation):,} held out ({config.data.data})\n"
        f"{f'resumed at step {trainer.step}' if config.run.resume else f'writing to {directory}'}",
        flush=True,
    )


def show(report: TrainReport, directory: Path) -> None:
    """The result, for people."""
    gain = report.unigram - report.validation_loss
    where = "below" if gain > 0 else "above"
    if report.trace is not None:
        print(f"\ncommunication of one training step, as this rank saw it\n{report.trace.table()}")
    if report.memory:
        print(f"\nmemory of one training step\n{report.memory}")
    if report.timeline:
        print(f"\ntimeline of one training step\n{report.timeline}")
    if report.sample:
        print(f"\na sample\n{'-' * 60}\n{report.sample}\n{'-' * 60}")
    print(
        f"\nheld-out loss      {report.validation_loss:.4f} nats per token, after {report.steps} steps\n"
        f"unigram entropy    {report.unigram:.4f}  (the loss is {abs(gain):.4f} {where} it)\n"
        f"ln(vocabulary)     {report.uniform:.4f}\n\n"
        f"{directory}/  config.toml  metrics.jsonl  loss.png  checkpoints/"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
