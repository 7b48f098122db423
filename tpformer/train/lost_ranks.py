"""A rank that is gone or hangs: the others end within the time-out, and each says for what it waited.

Gone: its connections close, and gloo raises where a peer waits for it. Hung: a thread beside the training sees that
nothing was finished in time, reads where the main thread stands, and ends the process. Neither costs a step anything.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from tpformer.collectives import Pending
from tpformer.mesh import Axis
from tpformer.trace import axis_name, site_of

Place = tuple[FrameType, int]
"""A frame, and the line at which it is."""

_OF_WORK = {1: "all_reduce", 4: "all_gather", 5: "all_gather", 9: "reduce_scatter", 16: "reduce_scatter"}
_OF_WORK |= {0: "broadcast", 12: "send", 13: "recv", 15: "barrier"}  # torch's OpType


class LostRankError(RuntimeError):
    """Another rank is gone or hangs; the text says for what this one waited."""


@dataclass
class Waiting:
    """What a process waits for, as far as its frames tell."""

    op: str = ""
    axis: str = ""
    ranks: int = 0
    site: str = "?"
    """file:line of the nearest caller outside torch and this library's plumbing."""
    backward: bool = False

    def __str__(self) -> str:
        what = f"{self.op or 'a collective'} on {self.axis} ({self.ranks} ranks)" if self.axis else self.op
        return f"{what or 'no collective of this rank'}, issued at {self.site}{' in backward' * self.backward}"


def waiting(places: Iterable[Place]) -> Waiting:
    """Read it from frames, the innermost first."""
    found = Waiting()
    for frame, line in places:
        path, name = frame.f_code.co_filename.replace("\\", "/"), frame.f_code.co_name
        found.backward |= name == "_engine_run_backward"
        if found.site != "?":
            continue  # outside it nothing is about this collective
        _read_locals(frame, found)
        if path.endswith("distributed/distributed_c10d.py") and not name.startswith("_"):
            found.op = _plain(name)
        elif "distributed/fsdp/" in path and not found.op:
            found.op = "all_gather" if "all_gather" in name or "unshard" in name else ""
        found.site = site_of(frame, line) or "?"
    return found


def _read_locals(frame: FrameType, found: Waiting) -> None:
    """Look for what was waited on among a frame's variables."""
    for value in frame.f_locals.values():
        if isinstance(value, Pending) and frame.f_code.co_name == "wait":
            found.op, axis = value.op, value.axis
            found.axis, found.ranks = (axis.name, axis.size) if axis else ("", 0)
        elif isinstance(value, dist.Work) and not found.op:
            found.op = _OF_WORK.get(value._get_op_type(), "")  # type: ignore[attr-defined]
        elif isinstance(value, dist.ProcessGroup) and not found.axis:
            found.axis, found.ranks = axis_name(value), value.size()
        elif isinstance(value, Axis) and not found.axis and value.size > 1:
            found.axis, found.ranks = value.name, value.size
    if not found.axis and "distributed/pipelining/" in frame.f_code.co_filename.replace("\\", "/"):
        stage = getattr(frame.f_locals.get("self"), "_stage", None) or _first_stage(frame)
        if stage is not None:
            found.axis, found.ranks = axis_name(stage.group), stage.group.size()


def _first_stage(frame: FrameType) -> Any:
    """Of a schedule with several stages a process, which all have one group."""
    return next(iter(getattr(frame.f_locals.get("self"), "_stages", ())), None)


def _plain(name: str) -> str:
    """`all_gather_into_tensor` -> `all_gather`."""
    known = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier", "send", "recv")
    return next((op for op in known if name.removeprefix("i").startswith(op)), name)


def is_of_communication(error: BaseException) -> bool:
    """Whether it was raised by a process group whose peers are gone or late."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


@contextmanager
def naming_lost_ranks(rank: int, when: Callable[[], str]) -> Iterator[None]:
    """Turn what communication raises if a peer is gone, or late, into one line; when: "step 12". Raises LostRankError.

    Everything else passes as it is.
    """
    try:
        yield
    except LostRankError:
        raise
    except (RuntimeError, dist.DistError) as error:
        if not is_of_communication(error):
            raise
        wait = waiting(list(traceback.walk_tb(error.__traceback__))[::-1])
        late = "timed out" in str(error).lower()
        what = "gave up waiting for" if late else "lost a peer in"
        end = "another rank hangs" if late else "another rank has died, or ended because of a third"
        raise LostRankError(f"rank {rank} {what} {wait}, {when()}: {end}") from error


class Watchdog:
    """Ends this process if nothing was finished for `seconds` while it is entered: `beat()` says that something was.

    It does not ask the process group, so that it holds for every kind of communication, point to point and NCCL's too,
    and for a main thread that hangs by itself. say: is told the line; by default it is printed.
    """

    def __init__(self, seconds: float, rank: int, when: Callable[[], str], say: Callable[[str], None] | None = None):
        self._seconds, self._rank, self._when, self._say = seconds, rank, when, say or _last_words
        self._over = threading.Event()
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self._over.clear()
        self.beat()
        self._main = threading.get_ident()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def beat(self) -> None:
        """A step, a batch of an evaluation or a checkpoint is finished."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 20)):
            waited = time.monotonic() - self._last
            if waited >= self._seconds:
                wait = waiting(_live(sys._current_frames(), self._main))
                pending = _pending_nccl()
                self._say(
                    f"rank {self._rank} waited {waited:.0f} s for {wait}, {self._when()}{pending}: "
                    f"{'another rank hangs or is lost' if wait.op or pending else 'this rank hangs'}"
                )
                return


def _live(frames: dict[int, FrameType], main: int) -> list[Place]:
    """Where the main thread stands, or the thread for which it waits: of a backward on CUDA, of a checkpoint."""
    here = list(traceback.walk_stack(frames[main]))
    if here[0][0].f_code.co_name == "_engine_run_backward":
        busy = "tpformer/layers/"
    elif _through(here, "tpformer/checkpoint/background.py"):
        busy = "tpformer/checkpoint/storage.py"
    else:
        return here
    others = (list(traceback.walk_stack(frame)) for ident, frame in frames.items() if ident != main)
    return next((there for there in others if _through(there, busy)), []) + here


def _through(places: list[Place], path: str) -> bool:
    return any(path in frame.f_code.co_filename.replace("\\", "/") for frame, _ in places)


def _pending_nccl() -> str:
    """What NCCL's flight recorder says is not finished (the host waits elsewhere); "" where there is none."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
    if dump is None or not torch.cuda.is_initialized():
        return ""
    return pending_entries(dump(True, True))


def pending_entries(dump: str | bytes) -> str:
    """The first collective of a flight recorder's JSON that is not completed, by op and axis; "" if all are."""
    for entry in json.loads(dump).get("entries", []):
        if entry.get("state") != "completed":
            axis = entry["process_group"][1].removeprefix("mesh_").replace("default_pg", "world")
            return f", on the device {entry['profiling_name'].removeprefix('nccl:')} on {axis}"
    return ""


def _last_words(line: str) -> None:
    """Say it and go at once: to leave in order would wait for the rank that hangs."""
    print(f"\ntpformer: error: {line}", file=sys.stderr, flush=True)
    os._exit(1)
