"""Running a function on several processes: gloo on CPU, kept alive between tests, failures with their rank."""

import importlib.util
import multiprocessing as mp
import os
import sys
import time
import traceback
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.interpreter import quick

WORKERS = 4
PRELOADED = ["examples.pretrain", "tests.proofs.cases"]  # with them comes what jobs import, once for all workers
JOBS = 150  # of a worker's life: gloo leaves some threads of each process group behind, and they cost time


class Ranks:
    """Worker processes, four or as many as asked for; `ranks(fn, world_size, *args)` runs fn(*args) on the first ones.

    fn is a function at the top level of its module. It finds the default process group running, and its
    results come back in rank order. One rank's exception, or a run longer than `timeout` seconds, is a
    RuntimeError with every rank's traceback, and no process is left hanging.
    """

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []
        # over a socket: with a store in a file each process group waits for its polling
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._jobs = 0
        # a fork of a process that has imported torch is there at once; but CUDA does not survive a fork
        self._context: Any = mp.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        mp.get_context("forkserver").set_forkserver_preload([__name__, *PRELOADED])

    def __call__(self, fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
        if self._jobs % JOBS == 0:
            self.close()
        self._start(max(WORKERS, world_size))
        self._jobs += 1
        path = str(Path(sys.modules[fn.__module__].__file__ or "").resolve())
        for rank in range(world_size):
            self._workers[rank][1].send((path, fn.__qualname__, args, rank, world_size, str(self._jobs)))
        return self._collect(world_size, time.monotonic() + timeout)

    def close(self) -> None:
        """End the workers."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self, count: int) -> None:
        while len(self._workers) < count:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs, self._store.port), daemon=True)
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


def _work(pipe: Connection, port: int) -> None:
    """A worker's life: one job after another, each in a process group of its own."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    modules: dict[str, types.ModuleType] = {}
    with quick():
        while True:
            try:
                path, name, args, rank, world_size, job = pipe.recv()
            except (EOFError, OSError):
                return
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
            try:
                module = modules[path] = modules.get(path) or _load(path)
                place = dist.PrefixStore(job, store)
                dist.init_process_group("gloo", store=place, rank=rank, world_size=world_size)
                answer = True, getattr(module, name)(*args)
                if dist.is_initialized():  # a peer may still be connecting
                    dist.barrier()
            except BaseException:
                answer = False, traceback.format_exc()
            if dist.is_initialized():
                dist.destroy_process_group()
            pipe.send(answer)


def _load(path: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
