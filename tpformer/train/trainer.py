"""The training loop: build, resume, step, evaluate, save, report."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tpformer.checkpoint.background import Checkpoints, Saved
from tpformer.checkpoint.store import Retention, latest_checkpoint, load_checkpoint
from tpformer.collectives import all_reduce_
from tpformer.data import TokenSampler, unigram_entropy
from tpformer.mesh import Mesh, divide
from tpformer.models.generate import generate
from tpformer.random import Key
from tpformer.trace import Trace
from tpformer.train.build import build
from tpformer.train.config import TrainConfig
from tpformer.train.corpus import Corpus
from tpformer.train.first_steps import FirstSteps
from tpformer.train.log import MetricsFile, peak_flops, plot_loss
from tpformer.train.lost_ranks import Watchdog, is_of_communication, naming_lost_ranks
from tpformer.train.replicas import check_replicas
from tpformer.train.schedule import learning_rate
from tpformer.train.state import begin_with, check_meta, documents, meta_of, parts_of
from tpformer.train.step import StepOptions, StepReport
from tpformer.train.stop import Stopped, StopSignal


@dataclass(frozen=True)
class TrainReport:
    """How a run ended: held-out loss in nats per token beside its marks, and one step's collectives."""

    steps: int
    validation_loss: float
    uniform: float  # ln(vocab_size)
    unigram: float  # entropy of the held-out tokens
    trace: Trace | None
    memory: str  # a table of every rank's bytes in a step
    timeline: str  # a table of what each stage did when, if it was asked for
    sample: str


class Trainer:
    """One run, at any layout: `Trainer(config, mesh, corpus, directory).run()`; every rank makes the same calls.

    stop: a signal that ends the run after a step.
    Raises ValueError for a config that does not fit the mesh, the data or the checkpoint.
    """

    def __init__(
        self, config: TrainConfig[Any], mesh: Mesh, corpus: Corpus, directory: Path, stop: StopSignal | None = None
    ):
        self.stop = stop or StopSignal()
        self.config, self.mesh, self.corpus, self.directory = config, mesh, corpus, directory
        run, data = config.run, config.data
        self.replica_batch = divide(run.batch_size, mesh.dp.size, "batch_size", "dp")
        self.sampler = TokenSampler(corpus.train, data.seq_len, run.seed, corpus.vocab_size)
        self.held_out = TokenSampler(corpus.validation, data.seq_len, run.seed, corpus.vocab_size, shuffle=False)
        built = build(config, mesh, corpus.vocab_size)
        self.model, self.runner, self.optimizer = built.model, built.runner, built.optimizer
        self.steps = FirstSteps(built, config, mesh, directory)
        # beside the weights, so that whoever opens them can read; read now, for it may be gone at the end
        named = corpus.tokenizer is not None and data.tokenizer != "byte"
        self.tokenizer = {"tokenizer.json": Path(data.tokenizer).read_bytes()} if named else {}
        self.checkpoints = Checkpoints(
            directory / "checkpoints",
            mesh,
            Retention(run.keep_checkpoints, run.keep_every),
            background=run.async_checkpoint,
        )
        self.step = self._resume() if run.resume else self._begin()
        self.optimizer.skipped = self.step - self.optimizer.steps
        self.watchdog = Watchdog(run.timeout_seconds, mesh.world.rank, self._when)
        self.chief = mesh.world.rank == 0
        self.metrics = MetricsFile(directory / "metrics.jsonl", self.step) if self.chief else None

    def run(self) -> TrainReport:
        """Train to the configured number of steps and report.

        Raises Stopped after a signal, FloatingPointError for a number that is not finite, ReplicaDriftError,
        LostRankError, and OSError for a checkpoint that cannot be written.
        """
        run = self.config.run
        with naming_lost_ranks(self.mesh.world.rank, self._when):
            with (
                tqdm(
                    total=run.steps, initial=self.step, unit="step", disable=not self.chief, dynamic_ncols=True
                ) as bar,
                self.watchdog if self.mesh.world.size > 1 else nullcontext(),  # alone there is nobody to wait for
            ):
                try:
                    self._train(bar)
                except Exception as error:  # what is being written still becomes a checkpoint, if all are there
                    if not is_of_communication(error):
                        self._log_saved(self.checkpoints.wait())
                    raise
                self._log_saved(self.checkpoints.wait())
            return self._finish()

    def _train(self, bar: Any) -> None:
        run = self.config.run
        started, first = time.perf_counter(), self.step
        while self.step < run.steps:
            report = self._train_step()
            self.watchdog.beat()
            rate = (self.step - first) * self._tokens_per_step() / (time.perf_counter() - started)
            self._show(bar, report, rate)
            if self.step % run.log_interval == 0 or self.step == run.steps or report.problem:
                self._log(**self._numbers(report), tokens_per_second=round(rate))
            if _due(self.step, run.check_replicas):
                check_replicas(self.optimizer.state(), self.optimizer.placements, self.mesh, self.step)
            if _due(self.step, run.eval_interval) and self.step < run.steps:
                self._log(validation_loss=self.evaluate())
            if _due(self.step, run.checkpoint_interval) or self.step == run.steps or report.stop:
                self.save()
            self.watchdog.beat()
            if report.stop and self.step < run.steps:
                raise Stopped(f"stopped by a signal after step {self.step}, which is saved: go on with --resume")

    def evaluate(self) -> float:
        """Mean loss over the first eval_samples held-out samples, in nats per token; collective."""
        count = min(max(self.config.run.eval_samples, 1), self.held_out.num_samples)
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        with torch.no_grad():
            for samples, counted in self._held_out_batches(count):
                loss = self.runner.loss(samples[:, :-1], samples[:, 1:])
                if counted:
                    total += loss.double() * len(samples)
                self.watchdog.beat()
        return all_reduce_(total, self.mesh.dp).item() / count

    def save(self) -> None:
        """Write a checkpoint of this step, maybe while the run goes on, and let go of old ones; collective."""
        parts = parts_of(self.optimizer.state(), self.optimizer.placements, self.model.config)
        meta = meta_of(self.config, self.model.config, self.mesh, self.step, self.optimizer)
        self._log_saved(self.checkpoints.save(self.step, parts, documents(self.model.config, meta) | self.tokenizer))

    def _train_step(self) -> StepReport:
        run = self.config.run
        start = self.step * run.batch_size + self.mesh.dp.rank * self.replica_batch
        samples = self.sampler.samples(start, self.replica_batch)
        options = StepOptions(
            micro_batch_size=run.micro_batch_size or self.replica_batch,
            lr=learning_rate(self.step, run.steps, self.config.optimizer),
            key=Key(run.seed).fold("dropout", self.step),
            z_loss=run.z_loss,
            stop=self.stop.asked,
        )
        report = self.steps.step(samples, options)
        self.step += 1
        return report

    def _held_out_batches(self, count: int) -> Iterator[tuple[Tensor, bool]]:
        """This replica's part of held-out samples 0..count - 1, in batches of the training size, and if they count.

        A replica that is through goes on with sample 0, for nothing: under FSDP the others need it in their gathers.
        """
        mine = range(self.mesh.dp.rank, count, self.mesh.dp.size)
        for first in range(0, -(-count // self.mesh.dp.size), self.replica_batch):
            numbers = mine[first : first + self.replica_batch]
            samples = torch.cat([self.held_out.samples(number, 1) for number in numbers or (0,)])
            yield samples.to(self.mesh.device), bool(numbers)

    def _begin(self) -> int:
        """Step 0, with the initial weights or those of init_from."""
        if self.config.run.init_from:
            begin_with(Path(self.config.run.init_from), self.optimizer, self.model.config, self.mesh)
        return 0

    def _resume(self) -> int:
        """Load the latest checkpoint and return the number of steps it has."""
        path = latest_checkpoint(self.directory / "checkpoints")
        if path is None:
            return self._begin()  # ended before its first checkpoint
        tensors = {name: torch.empty_like(part) for name, part in self.optimizer.state().items()}
        parts = parts_of(tensors, self.optimizer.placements, self.model.config)
        check = partial(check_meta, path, config=self.config, model=self.model.config)
        meta = load_checkpoint(path, parts, self.mesh.world, check)
        self.optimizer.load_state(tensors, meta["updates"])
        if self.optimizer.scaler is not None and "loss_scaler" in meta:
            self.optimizer.scaler.load_state(meta["loss_scaler"])
        return meta["step"]

    def _when(self) -> str:
        return f"after {self.step} steps"

    def _tokens_per_step(self) -> int:
        return self.config.run.batch_size * self.config.data.seq_len

    def _show(self, bar: Any, report: StepReport, rate: float) -> None:
        bar.update(1)
        if report.problem and self.chief:
            bar.write(f"skipped: {report.problem}", file=sys.stderr)
        shown = {"loss": f"{report.loss:.3f}", "tok/s": f"{rate:,.0f}"}
        peak = peak_flops(self.mesh.device)
        if peak:
            flops = rate * self.model.config.flops_per_token(self.config.data.seq_len)
            shown["MFU"] = f"{flops / (peak * self.mesh.world.size):.1%}"
        bar.set_postfix(shown, refresh=False)

    def _numbers(self, report: StepReport) -> dict[str, float]:
        """What of a step is logged; JSON has no infinity."""
        found = {"loss": report.loss, "grad_norm": report.grad_norm}
        if self.optimizer.scaler is not None:
            found |= {"loss_scale": report.loss_scale, "skipped_steps": self.optimizer.scaler.skipped}
        elif self.optimizer.skipped:
            found["skipped_steps"] = self.optimizer.skipped
        return {name: number for name, number in found.items() if math.isfinite(number)}

    def _log(self, **record: Any) -> None:
        if self.metrics:
            self.metrics.write({"step": self.step, **record})

    def _log_saved(self, done: list[Saved]) -> None:
        for saved in done:
            numbers = {"checkpoint_stall_seconds": saved.stall_seconds, "checkpoint_seconds": saved.seconds}
            self._log(checkpoint_step=saved.step, **{name: round(seconds, 6) for name, seconds in numbers.items()})

    def _finish(self) -> TrainReport:
        uniform, unigram = math.log(self.corpus.vocab_size), unigram_entropy(self.corpus.validation)
        validation = self.evaluate()
        if self.metrics:
            done = (r["step"] for r in self.metrics.read() if "validation_loss" in r)
            if self.step not in done:  # it is there if a finished run was resumed
                self._log(validation_loss=validation)
            levels = {"ln(vocabulary)": uniform, "unigram entropy": unigram}
            plot_loss(self.directory / "loss.png", self.metrics.read(), levels)
        seen = self.steps
        return TrainReport(
            self.step, validation, uniform, unigram, seen.trace, seen.memory, seen.timeline, self._sample()
        )

    def _sample(self) -> str:
        """Text after the prompt, where there is a tokenizer; collective."""
        run, tokenizer = self.config.run, self.corpus.tokenizer
        if tokenizer is None or not run.sample_tokens or not run.prompt:
            return ""
        prompt, limit = tokenizer.encode(run.prompt).tolist(), self.model.config.max_seq_len
        seen = prompt[-max(1, limit - 1) :]  # the end of a prompt that would fill the model
        tokens = torch.tensor([seen], device=self.mesh.device)
        new = min(run.sample_tokens, limit - len(seen))
        ids = generate(self.runner, tokens, max_new_tokens=new, temperature=0.8, top_k=40, seed=run.seed)
        new_ids = ids[0, len(seen) :].tolist()
        # a model opened by --init-from may have more ids than its tokenizer
        return tokenizer.decode(prompt + [token for token in new_ids if token < tokenizer.vocab_size])


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
