"""Saving while the run goes on: it stands still only for a copy to host memory."""

import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tpformer.checkpoint.chunks import Part, Staging, chunks
from tpformer.checkpoint.store import Retention, save_checkpoint
from tpformer.collectives import together
from tpformer.mesh import Mesh


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on the disk: how long the run stood still for it, and how long it took in all."""

    step: int
    stall_seconds: float
    seconds: float


class Checkpoints:
    """Writes the checkpoints of a run, at most one at a time; every rank makes the same calls.

    background: `save` returns once the numbers are copied to host memory (which then holds them twice); the former
    one's error is raised at the next save or wait, on every rank.
    """

    def __init__(self, directory: Path, mesh: Mesh, retention: Retention = Retention(), *, background: bool = True):
        self.directory, self.mesh, self.retention, self.background = directory, mesh, retention, background
        self._staging = Staging()
        self._group: Callable[[], dist.ProcessGroup | None] = lambda: None
        self._pending: Future[Saved] | None = None

    def save(self, step: int, parts: list[Part], documents: dict[str, Any]) -> list[Saved]:
        """Write this step's checkpoint after the former one; those that are complete now. Raises as save_checkpoint."""
        start = time.perf_counter()
        done = self.wait()
        copy = self._staging.copy if self.background else chunks
        found = together(lambda: copy(parts), self.mesh.world)
        group = self._gloo()
        stall = time.perf_counter() - start

        def write() -> Saved:
            save_checkpoint(self.directory, step, found, documents, group, retention=self.retention)
            seconds = time.perf_counter() - start
            return Saved(step, stall if self.background else seconds, seconds)

        if not self.background:
            return [*done, write()]
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = thread.submit(write)
        thread.shutdown(wait=False)
        return done

    def wait(self) -> list[Saved]:
        """Until the last one is on the disk; it, if it is new. Raises what went wrong with it."""
        pending, self._pending = self._pending, None
        return [] if pending is None else [pending.result()]

    def _gloo(self) -> dist.ProcessGroup | None:
        """A group of all ranks for the writing thread alone; None for one process.

        Held by torch only, so that Mesh.close ends it: one that outlives the interpreter aborts it.
        """
        if self.mesh.world.size > 1 and self._group() is None:
            self._group = weakref.ref(dist.new_group(backend="gloo", group_desc="checkpoint"))
        return self._group()
