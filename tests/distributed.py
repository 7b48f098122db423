"""Running a function on several processes: gloo on CPU, kept alive between tests, failures with their rank."""

import importlib.util
import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.interpreter import quick

WORKERS = 4


class Ranks:
    """Up to four worker processes; `ranks(fn, world_size, *args)` runs fn(*args) on the first world_size of them.

    fn is a function at the top level of its module. It finds the default process group running, and its
    results come back in rank order. One rank's exception, or a run longer than `timeout` seconds, is a
    RuntimeError with every rank's traceback, and no process is left hanging.
    """

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def __call__(self, fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
        self._start()
        with tempfile.TemporaryDirectory() as directory:
            path = str(Path(sys.modules[fn.__module__].__file__ or "").resolve())
            for rank in range(world_size):
                job = (path, fn.__qualname__, args, rank, world_size, f"{directory}/store")
                self._workers[rank][1].send(job)
            return self._collect(world_size, time.monotonic() + timeout)

    def close(self) -> None:
        """End the workers."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        while len(self._workers) < WORKERS:
            ours, theirs = mp.get_context("spawn").Pipe()
            process = mp.get_context("spawn").Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, world_size: int, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        while len(results) + len(errors) < world_size and time.monotonic() < deadline:
            for rank in set(range(world_size)) - results.keys() - errors.keys():
                try:
                    if self._workers[rank][1].poll(0.005):
                        ok, value = self._workers[rank][1].recv()
                        (results if ok else errors)[rank] = value
                except (EOFError, ConnectionError):
                    self._workers[rank][0].join(5)
                    errors[rank] = f"the process died with exit code {self._workers[rank][0].exitcode}"
            if errors:  # the others wait for a rank that will not come: a moment to report, then the end
                deadline = min(deadline, time.monotonic() + 2)
        if errors or len(results) < world_size:
            self.close()
            silent = set(range(world_size)) - results.keys() - errors.keys()
            errors.update(dict.fromkeys(silent, "no answer in time"))
            raise RuntimeError("\n".join(f"--- rank {rank}: {error}" for rank, error in sorted(errors.items())))
        return [results[rank] for rank in range(world_size)]


def _work(pipe: Connection) -> None:
    """A worker's life: one job after another, each in a process group of its own."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    modules: dict[str, types.ModuleType] = {}
    with quick():
        while True:
            try:
                path, name, args, rank, world_size, store = pipe.recv()
            except (EOFError, OSError):
                return
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
            try:
                module = modules[path] = modules.get(path) or _load(path)
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
                answer = True, getattr(module, name)(*args)
                if dist.is_initialized():  # a peer may still be connecting
                    dist.barrier()
            except BaseException:
                answer = False, traceback.format_exc()
            if dist.is_initialized():  # before the answer, at which the caller removes the store
                dist.destroy_process_group()
            pipe.send(answer)


def _load(path: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
