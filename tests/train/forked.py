"""Ranks that may die: processes forked for one run, of which some are killed or stopped at a chosen collective."""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tpformer.trace import Trace


@dataclass(frozen=True)
class Fault:
    """What happens to the last rank, before its collective of this op, axis and phase: SIGKILL or SIGSTOP."""

    signal: int
    op: str
    axis: str
    phase: str
    skip: int = 0
    """How many such collectives are let through."""


@dataclass
class Survivor:
    """How a rank ended that nothing happened to."""

    code: int | None
    err: str
    seconds: float
    """Since the other one was hit."""


class FaultyTrace(Trace):
    """Sees every collective before it is issued, and has the fault befall this process at one of them."""

    def __init__(self, fault: Fault):
        super().__init__()
        self._fault, self._left = fault, fault.skip

    def _record(self, operator: str, args: Any) -> None:
        super()._record(operator, args)
        call, fault = self.calls[-1], self._fault
        if (call.op, call.axis, call.phase) == (fault.op, fault.axis, fault.phase):
            self._left -= 1
            if self._left < 0:
                os.kill(os.getpid(), fault.signal)


def forked(action: Callable[..., None], world_size: int, *args: Any, timeout: float = 40) -> list[Survivor]:
    """Run action(rank, *args) on forked ranks with a process group; to be called in a process with one thread.

    Ends when all but the last rank have ended, and kills what is left.
    """
    with tempfile.TemporaryDirectory() as place:
        children = [_fork(action, rank, world_size, Path(place), args) for rank in range(world_size)]
        try:
            return _survivors(children, Path(place), time.monotonic() + timeout)
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)  # zombies too, until they are waited for
                os.waitpid(child, 0)


def _survivors(children: list[int], place: Path, deadline: float) -> list[Survivor]:
    hit = 0.0
    ends: dict[int, tuple[int, float]] = {}
    flags = os.WNOHANG | os.WEXITED | os.WSTOPPED | os.WNOWAIT
    while len(ends) < len(children) - 1 and time.monotonic() < deadline:
        for rank, child in enumerate(children):
            found = os.waitid(os.P_PID, child, flags)
            if found is not None and rank == len(children) - 1:
                hit = hit or time.monotonic()
            elif found is not None and rank not in ends:
                ends[rank] = (found.si_status, time.monotonic())
        time.sleep(0.002)
    nothing = (None, deadline)
    said = [(place / str(rank)).read_text() for rank in range(len(children) - 1)]
    return [Survivor(ends.get(r, nothing)[0], said[r], ends.get(r, nothing)[1] - hit) for r in range(len(said))]


def _fork(action: Callable[..., None], rank: int, world_size: int, place: Path, args: tuple[Any, ...]) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        sys.stderr = (place / str(rank)).open("w")
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        store = dist.FileStore(str(place / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        action(rank, *args)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)
