"""Running examples/pretrain.py: under torchrun as a person does, or by its main() on the ranks of the tests' pool."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from examples.pretrain import main

ROOT = Path(__file__).parents[2]
SMALL = [
    "--hidden-size",
    "32",
    "--num-layers",
    "1",
    "--num-heads",
    "4",
    "--seq-len",
    "16",
    "--batch-size",
    "4",
    "--eval-samples",
    "4",
    "--sample-tokens",
    "5",
    "--log-interval",
    "1",
    "--device",
    "cpu",
]
OF_LLAMA = ["--num-kv-heads", "2", "--head-dim", "8", "--ffn-hidden-size", "32"]
MARK = "TPFORMER_TEST_RUN"


@dataclass
class Ended:
    """How a launch ended."""

    code: int
    out: str
    err: str
    seconds: float
    left: list[int]
    """Processes of this launch that were still there, all of its ranks included."""


@dataclass
class Launch:
    """A torchrun that is under way; every process that comes of it carries a mark in its environment."""

    process: subprocess.Popen[str]
    mark: str
    started: float = field(default_factory=time.monotonic)

    def end(self, timeout: float = 90) -> Ended:
        """Wait for torchrun; what is left of it is noted, and killed."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self.process.communicate()
        ended = Ended(self.process.returncode, out, err, time.monotonic() - self.started, self.alive())
        self.kill()
        return ended

    def alive(self) -> list[int]:
        """The processes of this launch that run (zombies do not)."""
        return [pid for pid, environment in _environments() if f"{MARK}={self.mark}".encode() in environment]

    def ranks(self) -> dict[int, int]:
        """The process of each rank that runs."""
        mine = (env for env in _environments() if f"{MARK}={self.mark}".encode() in env[1])
        return {int(each[5:]): pid for pid, environment in mine for each in environment if each.startswith(b"RANK=")}

    def kill(self) -> None:
        """SIGKILL to each of its processes, until none is there."""
        while found := self.alive():
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def _environments() -> Iterator[tuple[int, list[bytes]]]:
    """Every process of this user, with its environment."""
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(directory.name), (directory / "environ").read_bytes().split(b"\0")


def launch(arguments: list[str], directory: Path, processes: int = 2, restarts: int = 0) -> Launch:
    """Start examples/pretrain.py under torchrun in a directory."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["--max-restarts", str(restarts)]
    mark = uuid.uuid4().hex
    places = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", MARK: mark}
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        [*command, str(ROOT / "examples" / "pretrain.py"), *arguments],
        cwd=directory,
        env=inherited | places,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return Launch(process, mark)


def pretrain(arguments: list[str], directory: Path) -> tuple[int, str, str]:
    """On a rank: main()'s exit code, and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    before = Path.cwd()
    os.chdir(directory)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
    finally:
        os.chdir(before)
    return code, out.getvalue(), err.getvalue()


def messages(err: str) -> list[str]:
    """What a person is told of: our lines, and tyro's boxes (by their last line)."""
    ours = [line for line in err.splitlines() if line.startswith("pretrain.py: error:")]
    return ours + [line for line in err.splitlines() if "For full helptext" in line]


def text_files(directory: Path, files: int = 3) -> Path:
    """A directory of text files; each of about 1500 bytes."""
    (directory / "text").mkdir()
    for number in range(files):
        lines = [f"def f{i}(x): return x + {number * i}\n" for i in range(50)]
        (directory / "text" / f"{number}.py").write_text("".join(lines))
    return directory / "text"


def token_ids(count: int, vocab_size: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Ids 0..vocab_size - 1, every one of them."""
    ids = np.random.default_rng(0).integers(0, vocab_size, count)
    ids[:vocab_size] = np.arange(vocab_size)
    return ids.astype(np.uint16)
