"""Measures jobs: those that are alive together take turns, so that a slow minute falls on all of them."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import Sample
from benchmarks.scaling_exposed import Stood, breakdown, summarise
from benchmarks.scaling_jobs import Job
from benchmarks.scaling_launch import JobError, Launch, Running, check_memory, timed_step

AGREEMENT = {"float32": (1e-5, 1e-5), "bfloat16": (2e-3, 5e-2)}
"""How far, relatively, the loss and the first norm's gradient may lie apart: some ten times what rounding does."""
AT_ONCE = 2  # jobs that start up at the same time

Say = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int = 7
    """Timed steps of each job, in each pass."""
    warmup: int = 1
    exposed: int = 3
    """Steps in which it is noted what stood still for communication."""
    together: bool = True
    """All jobs are alive at the same time and take turns; otherwise one after the other, in passes."""
    passes: int = 2
    """Of one after the other."""


@dataclass
class Measured:
    """What is known of a job; an error, and then maybe nothing else."""

    job: Job
    error: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    loss: float | None = None
    first_norm: list[float] | None = None
    communication: list[list[dict[str, Any]]] = field(default_factory=list)
    """By rank."""
    peak_bytes: list[int | None] = field(default_factory=list)
    """By rank."""
    samples: list[Sample] = field(default_factory=list)
    exposed: list[dict[str, Any]] = field(default_factory=list)

    def exposure(self) -> dict[str, Any] | None:
        """Of the steps looked at, the one with the median share."""
        ordered = sorted(self.exposed, key=lambda one: one["exposed_share"])
        return ordered[len(ordered) // 2] if ordered else None


def measure(jobs: Sequence[Job], effort: Effort, launch: Launch, say: Say = print) -> list[Measured]:
    """Measure every job; one that fails is listed with its error, and no process is left behind."""
    found = [Measured(job) for job in jobs]
    started: list[Running] = []
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))

    def start(number: int) -> Running:
        check_memory(jobs[number], launch.device == "cpu")
        running = Running(jobs[number], str(len(started)), store, launch)
        started.append(running)
        running.send("facts")
        return running

    try:
        if effort.together:
            alive = _start_all(found, start, say)
            _look_at(found, alive, say)
            _end_strangers(found, alive, say)
            _step(found, alive, effort, say)
        else:
            _one_by_one(found, start, effort, say)
    finally:
        for running in started:
            running.let_go()
        for running in started:
            running.close()
    return found


def _one_by_one(found: list[Measured], start: Callable[[int], Running], effort: Effort, say: Say) -> None:
    """Each job alone on the devices, in passes, the second backwards."""
    for turn in range(effort.passes):
        order = list(range(len(found)))
        for number in order if turn % 2 == 0 else reversed(order):
            if found[number].error is not None:
                continue
            alive: dict[int, Running] = {}
            with _noting(found[number], alive, say):
                running = start(number)
                alive[number] = running
                found[number].facts = running.answers("facts")[0]
            if turn == 0:
                _look_at(found, alive, say)
                _end_strangers(found, alive, say)
            _step(found, alive, effort, say)
            if number in alive:
                alive[number].close()


def _start_all(found: list[Measured], start: Callable[[int], Running], say: Say) -> dict[int, Running]:
    """Every job's processes, a few jobs at a time; those that have not failed, by number."""
    alive: dict[int, Running] = {}
    for first in range(0, len(found), AT_ONCE):
        few = range(first, min(first + AT_ONCE, len(found)))
        for number in few:
            with _noting(found[number], alive, say):
                alive[number] = start(number)
        for number in few:
            if number in alive:
                with _noting(found[number], alive, say):
                    found[number].facts = alive[number].answers("facts")[0]
                    say(f"{found[number].job.label} is there")
    return alive


@contextlib.contextmanager
def _noting(measured: Measured, alive: dict[int, Running], say: Say) -> Iterator[None]:
    """A failing job is noted, ended and left out from here on."""
    try:
        yield
    except JobError as error:
        measured.error = str(error)
        say(f"{measured.job.label} failed: {error}")
        for number in [number for number, running in alive.items() if running.job is measured.job]:
            alive.pop(number).close()


def _look_at(found: list[Measured], alive: dict[int, Running], say: Say) -> None:
    """What is asked of every job once, before any clock starts."""
    for number, running in list(alive.items()):
        measured = found[number]
        with _noting(measured, alive, say):
            answers = running.ask("check")
            measured.loss = sum(answer["loss"] for answer in answers)
            measured.first_norm = next((a["first_norm"] for a in answers if a["first_norm"] is not None), None)
            measured.communication = [answer["communication"] for answer in running.ask("trace")]
            measured.peak_bytes = [answer["peak_bytes"] for answer in running.ask("memory")]
            say(f"{measured.job.label} has been looked at")


def _end_strangers(found: list[Measured], alive: dict[int, Running], say: Say) -> None:
    """What is not the model that it should be is not timed."""
    compare(found)
    for number in [number for number in alive if found[number].error is not None]:
        say(f"{found[number].job.label} {found[number].error}")
        alive.pop(number).close()


def compare(found: list[Measured]) -> None:
    """Give every job an error that is not the model that the first of the same model and batch is; plain comes first.

    What is projected computes nothing of sense, and is not compared.
    """
    compared = [m for m in found if m.error is None and m.loss is not None and not m.job.projected]
    for measured in compared:
        same = [m for m in compared if (m.job.model, m.job.batch, m.job.dtype) == _question(measured.job)]
        first = min(same, key=lambda m: m.job.kind != "plain")
        measured.error = measured.error or _difference(measured, first)


def _question(job: Job) -> tuple[Any, int, str]:
    return job.model, job.batch, job.dtype


def _difference(measured: Measured, first: Measured) -> str | None:
    """How it is not the same model, or None."""
    loss_bound, gradient_bound = AGREEMENT[measured.job.dtype]
    assert measured.loss is not None and first.loss is not None
    loss_error = abs(measured.loss - first.loss) / abs(first.loss)
    gradient_error = 0.0
    if measured.first_norm is not None and first.first_norm is not None:
        mine, theirs = (torch.tensor(m.first_norm, dtype=torch.float64) for m in (measured, first))
        gradient_error = float((mine - theirs).norm() / theirs.norm())
    if loss_error < loss_bound and gradient_error < gradient_bound:
        return None
    return (
        f"is not the model of {first.job.label}: the loss is off by {loss_error:.1e} (at most {loss_bound:.0e}), "
        f"the first norm's gradient by {gradient_error:.1e} (at most {gradient_bound:.0e})"
    )


def _step(found: list[Measured], alive: dict[int, Running], effort: Effort, say: Say) -> None:
    """Every job steps once a round, backwards on odd rounds so that none always follows the same one."""
    for index in range(effort.warmup + max(effort.rounds, effort.exposed)):
        turn = index - effort.warmup
        said = []
        for number in list(alive) if index % 2 == 0 else list(reversed(alive)):
            measured, running = found[number], alive[number]
            with _noting(measured, alive, say):
                if turn < effort.rounds:
                    sample = timed_step(running)
                    measured.samples.extend([sample] if turn >= 0 else [])
                    said.append(f"{measured.job.label} {1e3 * sample.seconds:.1f}{'' if sample.quiet else '~'}")
                if 0 <= turn < effort.exposed:
                    measured.exposed.append(_exposed(running))
        say(f"{f'round {turn + 1}' if turn >= 0 else 'warm-up'}: {'  '.join(said)}")


def _exposed(running: Running) -> dict[str, Any]:
    """A step in which it is noted what stood still, as shares."""
    answers, axis = running.ask("exposed"), running.job.axis
    if "stood" in answers[0]:
        return summarise([Stood.of(answer["stood"]) for answer in answers], axis)
    ranks = [answer["kernels"] for answer in answers]
    mean = statistics.fmean
    names = {name for rank in ranks for name in rank["exposed"]}
    axes = {name: mean(rank["exposed"].get(name, 0.0) for rank in ranks) for name in names}
    shares = breakdown(mean(rank["seconds"] for rank in ranks), axes, {})
    idle = mean(rank["idle"] for rank in ranks) / shares["step_seconds"]
    return shares | {"idle_share": idle, "compute_share": shares["compute_share"] - idle}
