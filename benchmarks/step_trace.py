"""Reads what torch.profiler exports: which operator or kernel took how long, inside which operators, in which part.

The events are those of the Trace Event Format: times in µs, what lies inside another's time on a thread lies inside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from benchmarks.step_groups import RANGES

Event = dict[str, Any]
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ENGINE = "autograd::engine::evaluate_function: "  # holds a backward, and beside it sums of gradients


@dataclass(frozen=True)
class Piece:
    """Some time of a step: an operator's own on a CPU, a kernel's on a GPU."""

    names: tuple[str, ...]
    """Its own name and, innermost first, those of the operators around it, or around its launch."""
    part: str | None
    """forward, backward or optimizer; None outside of all."""
    ms: float


@dataclass
class _Operator:
    event: Event
    around: tuple[str, ...]
    inside: Decimal = Decimal(0)  # µs of the operators directly inside

    @property
    def names(self) -> tuple[str, ...]:
        return (_plain(self.event["name"]), *self.around)


def read(path: Path) -> list[Event]:
    """The complete events of an exported trace; floats of so many digits would lose the nanoseconds."""
    events = json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def pieces(events: list[Event], on_cuda: bool) -> list[Piece]:
    """Kernels and copies with the operators that launched them or, for a CPU, operators less what is inside them."""
    operators = list(_nested([event for event in events if event.get("cat") in ("cpu_op", "user_annotation")]))
    part = _Parts(events).of
    if not on_cuda:
        return [
            Piece(found.names, part(found.event), float(found.event["dur"] - found.inside) / 1e3)
            for found in operators
            if found.event["cat"] == "cpu_op"
        ]
    launchers = {found.event.get("args", {}).get("External id"): found for found in operators}
    launchers.pop(None, None)
    found_pieces = []
    for event in events:
        if event.get("cat") in ON_DEVICE:
            launcher = launchers.get(event.get("args", {}).get("External id"))
            around = launcher.names if launcher else ()
            where = part(launcher.event) if launcher else None
            found_pieces.append(Piece((event["name"], *around), where, float(event["dur"]) / 1e3))
    return found_pieces


class _Parts:
    """The spans of time that are the parts of steps; a backward of CUDA runs on a thread of its own."""

    def __init__(self, events: list[Event]):
        named = {range_name: part for part, range_name in RANGES.items()}
        spans = (event for event in events if event.get("cat") == "user_annotation" and event["name"] in named)
        self._spans = [(event["ts"], event["ts"] + event["dur"], named[event["name"]]) for event in spans]

    def of(self, event: Event) -> str | None:
        """The part in which an operator began."""
        return next((part for start, end, part in self._spans if start <= event["ts"] < end), None)


def _nested(events: list[Event]) -> Iterator[_Operator]:
    """Every operator with those around it on its thread."""
    open_ones: list[_Operator] = []
    thread = None
    for event in sorted(events, key=lambda e: (str(e["pid"]), str(e["tid"]), e["ts"], -e["dur"])):
        if (event["pid"], event["tid"]) != thread:
            thread, open_ones = (event["pid"], event["tid"]), []
        while open_ones and event["ts"] >= open_ones[-1].event["ts"] + open_ones[-1].event["dur"]:
            open_ones.pop()
        around = [o.event["name"] for o in reversed(open_ones) if not o.event["name"].startswith(ENGINE)]
        if open_ones:
            open_ones[-1].inside += event["dur"]
        open_ones.append(_Operator(event, tuple(around)))
        yield open_ones[-1]


def _plain(name: str) -> str:
    return name.removeprefix(ENGINE)
