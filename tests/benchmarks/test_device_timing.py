"""The clocks of the kernel benchmark, on a pretended GPU whose every call takes a known time."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from benchmarks import device_timing
from benchmarks.device_timing import Stopwatch, Work, interleave, stopwatch, summary


@dataclass
class Device:
    """A pretended GPU: events read its clock, and a graph takes as long as what was captured took."""

    now: float = 0.0  # milliseconds
    capture: bool = True
    replays: list[float] = field(default_factory=list)

    def spend(self, milliseconds: float) -> None:
        self.now += milliseconds

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: object) -> Iterator[None]:
        if not self.capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        before = self.now
        yield
        graph.milliseconds, self.now = self.now - before, before

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        class Graph:
            milliseconds = 0.0

            def replay(self) -> None:
                device.replays.append(self.milliseconds)
                device.spend(self.milliseconds)

        for name, value in {"Event": Event, "CUDAGraph": Graph, "graph": self.graph}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "a stream")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    pretended = Device()
    pretended.install(monkeypatch)
    return pretended


def test_short_work_is_replayed_from_a_graph(device: Device) -> None:
    work = Work((lambda: device.spend(0.02), lambda: device.spend(0.04)))
    watch = stopwatch(work, torch.device("cuda"))
    assert (watch.how, watch.sample()) == ("graph", pytest.approx(30e-6))
    assert device.replays[0] >= 1e3 * device_timing.SAMPLE  # long enough to be timed well


def test_what_cannot_be_captured_is_launched_again_and_again(device: Device) -> None:
    device.capture = False
    watch = stopwatch(Work((lambda: device.spend(0.02),)), torch.device("cuda"))
    assert (watch.how, watch.sample()) == ("launches", pytest.approx(20e-6))
    assert device.replays == []


def test_long_work_needs_no_graph(device: Device) -> None:
    watch = stopwatch(Work((lambda: device.spend(5.0),)), torch.device("cuda"))
    assert (watch.how, watch.sample()) == ("launches", pytest.approx(5e-3))


def test_what_prepares_a_call_is_not_timed(device: Device) -> None:
    watch = stopwatch(Work((lambda: device.spend(0.5),), prepare=lambda: device.spend(3.0)), torch.device("cuda"))
    assert (watch.how, watch.sample()) == ("single", pytest.approx(0.5e-3))


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def watch(name: str) -> Stopwatch:
        return Stopwatch(lambda: order.append(name) or float(len(order)), "wall")  # type: ignore[func-returns-value]

    samples = interleave({"a": watch("a"), "b": watch("b")}, rounds=3)
    assert "".join(order) == "abbaab"
    assert samples == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}
    assert summary([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx({"median_ms": 3e3, "p20_ms": 1.8e3, "p80_ms": 4.2e3})
