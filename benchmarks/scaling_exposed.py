"""Exposed communication: how long a step stood still for it, by mesh axis.

On a CPU the main thread stands still: in collectives, in `Work.wait` (of sends and receives too) and in functional
waits, whoever issued them; only waits inside C++ escape (DistributedDataParallel's). On CUDA the compute stream does:
what communication kernels run while no other kernel does. Part of it is idleness: a rank that waits until another
comes (a pipeline's bubble, a slower rank) and not for bytes to travel.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tpformer.trace import axis_name

Span = tuple[float, float]


@dataclass(frozen=True)
class Wait:
    """The main thread stood still from begin to end, in seconds of the machine's clock."""

    key: str
    """Of the communication waited for: the same on all ranks that take part."""
    axis: str
    begin: float
    end: float


@dataclass(frozen=True)
class Stood:
    """One rank's step: when it issued what, and where it stood still."""

    seconds: float
    issued: dict[str, float] = field(default_factory=dict)
    waits: tuple[Wait, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Stood:
        """What `to_plain` made."""
        return cls(plain["seconds"], plain["issued"], tuple(Wait(**wait) for wait in plain["waits"]))


class Waits(TorchDispatchMode):
    """Notes what the process issues and waits for while it is entered; on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.issued: dict[str, float] = {}
        self.waits: list[Wait] = []
        self._count: Counter[str] = Counter()
        # by identity; kept, so that no other object gets the same one
        self._pending: dict[int, tuple[object, str, str]] = {}

    def __enter__(self) -> Waits:
        self._torch_wait = torch_wait = dist.Work.wait

        def wait(work: dist.Work, *args: Any) -> Any:
            begin = time.perf_counter()
            result = torch_wait(work, *args)
            self._stood(id(work), begin)
            return result

        dist.Work.wait = wait  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        dist.Work.wait = self._torch_wait  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ in ("DTensor", "AsyncCollectiveTensor") for kind in types):
            return NotImplemented  # they go first, and issue and wait for what they need
        if func.namespace not in ("c10d", "_c10d_functional"):
            return func(*args, **(kwargs or {}))
        begin = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name == "wait_tensor":
            self._stood(args[0].data_ptr(), begin)
        elif (group := _group(args)) is not None:
            self._issue(name, group, args, begin, result)
        return result

    def _issue(self, name: str, group: dist.ProcessGroup, args: Any, begin: float, result: Any) -> None:
        place = f"{axis_name(group)} {group.group_name}"
        if name == "send":
            place += f" {group.rank()}>{args[2]}"
        elif name.startswith("recv"):
            place += f" {args[2]}>{group.rank()}"
        key, axis = f"{place} {self._count[place]}", axis_name(group)
        self._count[place] += 1
        self.issued[key] = begin
        for handle, value in _handles(result):
            self._pending[handle] = value, key, axis
        self.waits.append(Wait(key, axis, begin, time.perf_counter()))  # the call itself, which may wait too

    def _stood(self, handle: int, begin: float) -> None:
        if handle in self._pending:
            _, key, axis = self._pending[handle]
            self.waits.append(Wait(key, axis, begin, time.perf_counter()))


def _group(args: Any) -> dist.ProcessGroup | None:
    """The process group among an operator's arguments, or the one that the last of them names."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return dist.ProcessGroup.unbox(argument)
    if args and isinstance(args[-1], str):
        return dist.distributed_c10d._resolve_process_group(args[-1])  # type: ignore[arg-type]
    return None


def _handles(result: Any) -> Iterable[tuple[int, object]]:
    """What may be waited for later: works by identity, functional results by address."""
    for value in result if isinstance(result, list | tuple) else [result]:
        if isinstance(value, torch.ScriptObject):
            work = dist.Work.unbox(value)
            yield id(work), work
        elif isinstance(value, torch.Tensor):
            yield value.data_ptr(), value


def summarise(ranks: list[Stood], axis: str) -> dict[str, Any]:
    """Means over the ranks of one step, in seconds: exposed by axis, and how much of it was waiting for other ranks.

    axis: that of a job with one axis; groups that no mesh has named are on it.
    """
    ready: dict[str, float] = {}
    for rank in ranks:
        for key, moment in rank.issued.items():
            ready[key] = max(moment, ready.get(key, moment))
    exposed: dict[str, float] = defaultdict(float)
    waiting: dict[str, float] = defaultdict(float)
    for wait in (wait for rank in ranks for wait in rank.waits):
        name = wait.axis if wait.axis in ("tp", "pp", "dp") else axis
        exposed[name] += (wait.end - wait.begin) / len(ranks)
        late = min(max(ready[wait.key] - wait.begin, 0.0), wait.end - wait.begin)
        waiting[name] += late / len(ranks)
    step = sum(rank.seconds for rank in ranks) / len(ranks)
    return breakdown(step, dict(exposed), dict(waiting))


def breakdown(step: float, exposed: dict[str, float], waiting: dict[str, float]) -> dict[str, Any]:
    """The shares of a step: computing, communication by axis, and of that the waiting for other ranks, or idle."""
    return {
        "step_seconds": step,
        "compute_share": 1 - sum(exposed.values()) / step,
        "axes": {
            axis: {"seconds": seconds, "share": seconds / step, "waiting_share": waiting.get(axis, 0.0) / step}
            for axis, seconds in sorted(exposed.items())
        },
        "exposed_share": sum(exposed.values()) / step,
        "idle_share": sum(waiting.values()) / step,
    }


def kernels_exposed(events: list[dict[str, Any]], axis: str) -> tuple[float, dict[str, float], float]:
    """Seconds from the first kernel of a rank to the last, communication by axis that no kernel ran beside, and idle.

    events: torch.profiler's complete events, as `step_trace.read` gives them.
    """
    compute: list[Span] = []
    communication: dict[str, list[Span]] = defaultdict(list)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            span = float(event["ts"]) / 1e6, (float(event["ts"]) + float(event["dur"])) / 1e6
            if not event["name"].startswith("nccl"):
                compute.append(span)
                continue
            named = str(event.get("args", {}).get("Process Group Description", "")).removeprefix("mesh_")
            communication[named if named in ("tp", "pp", "dp") else axis].append(span)
    every = [*compute, *(span for spans in communication.values() for span in spans)]
    if not every:
        return 0.0, {}, 0.0
    whole = max(end for _, end in every) - min(begin for begin, _ in every)
    exposed = {name: length([*spans, *compute]) - length(compute) for name, spans in sorted(communication.items())}
    return whole, exposed, whole - length(every)


def length(spans: list[Span]) -> float:
    """Seconds that at least one of the spans covers."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
