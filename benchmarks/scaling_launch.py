"""Starts a job's processes by torchrun, asks them for steps, and ends them whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks import harness
from benchmarks.scaling_jobs import Job
from tpformer.models.llama import LlamaConfig

ROOT = Path(__file__).parents[1]
LOOK = 0.01  # seconds between looks for an answer: a store that waits and finds nothing complains about it
PROCESS_BYTES = 400 << 20  # of a process that has imported torch, about


class JobError(Exception):
    """A job cannot go on; one line."""


@dataclass(frozen=True)
class Launch:
    """How processes are started."""

    device: str | None = None
    """As Mesh.create takes it."""
    threads: int = 1
    timeout: float = 120.0
    """Seconds in which every answer must come."""


class Running:
    """The processes of one job, alive until `close`."""

    def __init__(self, job: Job, name: str, store: dist.TCPStore, launch: Launch):
        self.job, self.name, self._store, self._launch = job, name, store, launch
        self._asked, self._failed = 0, False
        self._log = Path(tempfile.mkdtemp(prefix="scaling-"))
        place = {"port": store.port, "name": name, "device": launch.device, "threads": launch.threads}
        store.set(f"{name}/error", "")
        environment = os.environ | {
            "OMP_NUM_THREADS": str(launch.threads),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval", "1"]
        worker = ["-m", "benchmarks.scaling_worker", json.dumps(place | {"job": job.to_json()})]
        with (self._log / "log").open("w") as log:
            self._process = subprocess.Popen(
                [*torchrun, "--nproc-per-node", str(job.processes), *worker],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt from the keyboard is for this process alone
            )

    def ask(self, what: str) -> list[dict[str, Any]]:
        """Every rank's answer. Raises JobError if a rank fails, is gone, or does not answer in time."""
        self.send(what)
        return self.answers(what)

    def send(self, what: str) -> None:
        """Ask without waiting."""
        self._store.set(f"{self.name}/ask/{self._asked}", what)
        self._asked += 1

    def answers(self, what: str) -> list[dict[str, Any]]:
        """Wait for what was sent last. Raises JobError as `ask` does."""
        keys = [f"{self.name}/answer/{self._asked - 1}/{rank}" for rank in range(self.job.processes)]
        deadline = time.monotonic() + self._launch.timeout
        while not self._store.check(keys):
            time.sleep(LOOK)
            if problem := self._problem(what, deadline):
                self._failed = True
                raise JobError(problem)
        return [json.loads(self._store.get(key)) for key in keys]

    def _problem(self, what: str, deadline: float) -> str:
        """Why there will be no answer; "" as long as there may be one."""
        ended = self._process.poll() is not None  # asked first: a process that ends has told its error before
        if error := self._store.get(f"{self.name}/error").decode():
            return error
        if ended:
            return f"{what}: its processes have ended: {self._last_line()}"
        return f"{what}: no answer in {self._launch.timeout:g} s" if time.monotonic() > deadline else ""

    def _last_line(self) -> str:
        lines = (self._log / "log").read_text(errors="replace").split("\n")
        said = (line.strip()[:200] for line in reversed(lines) if line.strip("=- "))  # torchrun draws lines
        return next(said, "without a word")

    def let_go(self) -> None:
        """Tell the processes that nothing more will be asked."""
        self._store.set(f"{self.name}/ask/{self._asked}", "end")

    def close(self) -> None:
        """End the processes: let them go, then ask torchrun to end them, then kill them. Twice is no more than once."""
        self.let_go()
        for patience, then in ((0.0 if self._failed else 10.0, signal.SIGTERM), (5.0, signal.SIGKILL)):
            try:
                self._process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                self._process.send_signal(then)
        self._process.wait()
        self._kill_workers()
        shutil.rmtree(self._log, ignore_errors=True)

    def _kill_workers(self) -> None:
        """torchrun, if it was killed itself, has left them behind."""
        for rank in range(self.job.processes):
            key = f"{self.name}/pid/{rank}"
            if self._store.check([key]) and _is_worker(pid := int(self._store.get(key))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _is_worker(pid: int) -> bool:
    """Whether the number is still that of one of ours."""
    try:
        return b"benchmarks.scaling_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def timed_step(running: Running) -> harness.Sample:
    """One step of all ranks: the slowest one's seconds, and what others used of the machine meanwhile."""
    busy, own, start = harness.machine_busy_seconds(), harness.own_busy_seconds(), time.perf_counter()
    answers = running.ask("step")
    window = time.perf_counter() - start
    own = harness.own_busy_seconds() - own + sum(answer["own"] for answer in answers)
    after = harness.machine_busy_seconds()
    seconds = max(answer["seconds"] for answer in answers)
    if busy is None or after is None:
        return harness.Sample(seconds, None)
    return harness.Sample(seconds, (after - busy - own) / window)


def bytes_needed(job: Job) -> int:
    """About how much memory a job's processes take on a CPU: each builds the whole weights first."""
    sizes = job.sizes()
    parameters = 4 * sizes.num_parameters()
    logits = 4 * job.tokens * sizes.vocab_size
    whole = 2 * parameters if isinstance(sizes, LlamaConfig) else parameters
    return job.processes * (PROCESS_BYTES + whole) + 2 * parameters + 3 * logits


def bytes_available() -> int | None:
    """Memory that nobody uses; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def check_memory(job: Job, on_cpu: bool) -> None:
    """Raises JobError if a CPU job would take more memory than there is."""
    needed, available = bytes_needed(job), bytes_available()
    if on_cpu and available is not None and needed > available:
        raise JobError(
            f"needs about {needed / 2**30:.1f} GiB, and {available / 2**30:.1f} are free: "
            "take fewer --kinds, or --no-together"
        )
