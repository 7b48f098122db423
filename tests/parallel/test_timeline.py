"""A timeline's spans are what the clock said, from a zero that the ranks share; idle time is what they leave."""

import itertools
import time
from typing import Any

import pytest
import torch

from tests.distributed import Ranks
from tpformer import Axis, Mesh
from tpformer.parallel import timeline as module
from tpformer.parallel.timeline import Span, Timeline, idle_seconds, idle_share, pipeline_window, record

CPU = torch.device("cpu")


@pytest.fixture
def _ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by one second at each look."""
    ticks = itertools.count(100)
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))


@pytest.mark.usefixtures("_ticks")
def test_spans_are_what_the_clock_said() -> None:
    timeline = Timeline(CPU)
    timeline.start(Axis("world"))
    with timeline.span("forward", stage=2, micro_batch=0):
        pass
    with record(timeline, "backward", 2, 0):
        time.perf_counter()
    with timeline.span("optimizer"):
        pass
    spans = [Span("forward", 2, 0, 1, 2), Span("backward", 2, 0, 3, 5), Span("optimizer", -1, -1, 6, 7)]
    assert timeline.spans() == spans
    assert timeline.spans() == spans  # reading is no end


@pytest.mark.usefixtures("_ticks")
def test_starting_again_forgets() -> None:
    timeline = Timeline(CPU)
    for micro_batch in (0, 1):
        timeline.start(Axis("world"))
        with timeline.span("forward", 0, micro_batch):
            pass
    assert timeline.spans() == [Span("forward", 0, 1, 1, 2)]


def test_without_a_timeline_nothing_is_recorded() -> None:
    with record(None, "forward", 0, 0):
        pass


def test_a_span_that_failed_is_not_recorded() -> None:
    timeline = Timeline(CPU)
    timeline.start(Axis("world"))
    with pytest.raises(KeyError), timeline.span("forward"):
        raise KeyError
    assert timeline.spans() == []


def test_a_timeline_without_a_zero_is_refused() -> None:
    timeline = Timeline(CPU)
    with timeline.span("forward"):
        pass
    with pytest.raises(ValueError, match="has no zero, but 1 spans"):
        timeline.spans()


def test_a_gpu_is_timed_by_events_read_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """With events that stand for CUDA's: each on the stream that computes, and none read before the GPU is done."""
    log: list[str] = []
    ticks = itertools.count(5)

    class Event:
        def __init__(self, enable_timing: bool = False):
            assert enable_timing

        def record(self, stream: str) -> None:
            log.append(f"record on {stream}")
            self.time = next(ticks)

        def elapsed_time(self, end: Any) -> float:
            log.append("read")
            return float(end.time - self.time)  # milliseconds

    gpu, zeros = torch.device("cuda", 0), torch.zeros
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(f"wait for {device}"))
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    timeline = Timeline(gpu)
    timeline.start(Axis("world"))
    with timeline.span("forward", 1, 4):
        pass
    assert log == ["record on the stream of cuda:0"] * 3
    assert timeline.spans() == [Span("forward", 1, 4, 0.001, 0.002)]
    assert log[3:] == ["wait for cuda:0", "read", "read"]


def zero(late: float) -> float:
    """On a rank: the zero on this machine's clock, of ranks that come one after another."""
    mesh = Mesh.create(pp=2, device="cpu")
    timeline = Timeline(CPU)
    time.sleep(late * mesh.world.rank)
    timeline.start(mesh.world)
    before = time.perf_counter()
    with timeline.span("forward", 0, 0):
        pass
    (span,) = timeline.spans()
    assert 0 <= span.start <= span.end
    return before - span.start


def test_ranks_share_the_zero(ranks: Ranks) -> None:
    """One rank comes half a second late, and the other's zero waits for it (one machine has one monotonic clock)."""
    first, second = ranks(zero, 2, 0.5)
    assert abs(first - second) < 0.25


def test_idle_time_by_hand() -> None:
    """A window of 1 to 9 s; what an optimizer does is no work of the pipeline."""
    ranks = [
        [Span("forward", 0, 0, 1, 2), Span("backward", 0, 0, 7, 9), Span("optimizer", -1, -1, 9, 12)],
        [Span("forward", 1, 0, 2, 3), Span("input gradient", 1, 0, 3, 5), Span("weight gradient", 1, 0, 5, 8)],
        [],
    ]
    assert pipeline_window(ranks) == (1, 9)
    assert idle_seconds(ranks) == [5, 2, 8]
    assert idle_share(ranks) == 15 / 24


@pytest.mark.parametrize("start", [1.0, 1.5, 1.999])
def test_spans_that_overlap_are_refused(start: float) -> None:
    """Negative control: counted twice, the time would look like work."""
    spans = [Span("forward", 0, 0, 1, 2), Span("backward", 0, 0, start, 4)]
    with pytest.raises(ValueError, match=r"rank 1: .* \(.* s\) begins before .* \(.* s\) has ended"):
        idle_seconds([[], spans])
    with pytest.raises(ValueError, match="rank 0"):
        idle_share([spans[::-1]])
    assert idle_seconds([[spans[0], spans[1]._replace(start=2.0)]]) == [0]


def test_nothing_recorded_has_no_idle_time() -> None:
    with pytest.raises(ValueError, match="2 ranks, but no forward or backward"):
        idle_share([[], [Span("optimizer", -1, -1, 0, 1)]])
