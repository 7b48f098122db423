"""When a rank worked on what during a step, on a clock whose zero the ranks share."""

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, NamedTuple, get_args

import torch

from tpformer.collectives import all_reduce_
from tpformer.mesh import Axis

Kind = Literal["forward", "backward", "input gradient", "weight gradient", "optimizer"]
"""A backward is both gradients at once; the schedules without a bubble compute them apart."""
KINDS: tuple[Kind, ...] = get_args(Kind)
Mark = float | torch.cuda.Event


class Span(NamedTuple):
    """One piece of a rank's work, in seconds from the timeline's zero; -1 is no one stage, or micro-batch."""

    kind: Kind
    stage: int
    micro_batch: int
    start: float
    end: float


class Timeline:
    """One rank's spans of a step: on a GPU by events, read only at the end; on a CPU by the clock."""

    def __init__(self, device: torch.device):
        self.device = device
        self._origin: Mark | None = None
        self._marks: list[tuple[Kind, int, int, Mark, Mark]] = []

    def start(self, axis: Axis) -> None:
        """Forget what was recorded, and set the zero as every rank of the axis arrives here; collective."""
        # a sum that is read, and not a barrier: no rank has it before all have come, and it empties the GPU's queue
        all_reduce_(torch.zeros((), device=self.device), axis).item()
        self._origin, self._marks = self._mark(), []

    @contextmanager
    def span(self, kind: Kind, stage: int = -1, micro_batch: int = -1) -> Iterator[None]:
        """Record what runs inside; spans of a rank follow each other."""
        start = self._mark()
        yield
        self._marks.append((kind, stage, micro_batch, start, self._mark()))

    def spans(self) -> list[Span]:
        """What was recorded, in the order of its ends; waits for the GPU.

        Raises ValueError if the timeline was not started.
        """
        if self._origin is None:
            raise ValueError(f"the timeline has no zero, but {len(self._marks)} spans: start() it before the step")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        origin = self._origin
        return [
            Span(kind, stage, micro_batch, _seconds(origin, start), _seconds(origin, end))
            for kind, stage, micro_batch, start, end in self._marks
        ]

    def _mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def record(
    timeline: Timeline | None, kind: Kind, stage: int = -1, micro_batch: int = -1
) -> AbstractContextManager[None]:
    """The timeline's span, or nothing where there is no timeline."""
    return nullcontext() if timeline is None else timeline.span(kind, stage, micro_batch)


def pipeline_window(ranks: Sequence[Sequence[Span]]) -> tuple[float, float]:
    """From the first span's start to the last backward's end over all ranks, optimizers apart.

    Raises ValueError if no rank has a span of the pipeline.
    """
    spans = [span for rank in ranks for span in rank if span.kind != "optimizer"]
    if not spans:
        raise ValueError(f"{len(ranks)} ranks, but no forward or backward was recorded on any")
    return min(span.start for span in spans), max(span.end for span in spans)


def idle_seconds(ranks: Sequence[Sequence[Span]]) -> list[float]:
    """How long each rank idled within the pipeline's window.

    Raises ValueError if spans of a rank overlap: their sum would not be the time that it worked.
    """
    start, end = pipeline_window(ranks)
    for number, rank in enumerate(ranks):
        ordered = sorted(rank, key=lambda span: (span.start, span.end))
        for first, second in itertools.pairwise(ordered):
            if second.start < first.end:
                raise ValueError(f"rank {number}: {_named(second)} begins before {_named(first)} has ended")
    return [end - start - sum(span.end - span.start for span in rank if span.kind != "optimizer") for rank in ranks]


def idle_share(ranks: Sequence[Sequence[Span]]) -> float:
    """The ranks' mean idle share of the pipeline's window, which is called the bubble.

    Raises ValueError as `idle_seconds` does.
    """
    start, end = pipeline_window(ranks)
    return sum(idle_seconds(ranks)) / (len(ranks) * (end - start))


def _named(span: Span) -> str:
    return f"{span.kind} of micro-batch {span.micro_batch} on stage {span.stage} ({span.start:.6f}-{span.end:.6f} s)"


def _seconds(origin: Mark, mark: Mark) -> float:
    if isinstance(origin, torch.cuda.Event) and isinstance(mark, torch.cuda.Event):
        return origin.elapsed_time(mark) / 1e3  # events know milliseconds
    assert isinstance(origin, float) and isinstance(mark, float)
    return mark - origin
