"""What every test of the kernels may rely on."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
COMPILATION = pytest.StashKey[tuple[subprocess.Popen[bytes], Any]]()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Random inputs are the same in every run, whichever tests run."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for the compilation comes last."""
    items.sort(key=_waits)


def _waits(item: pytest.Item) -> bool:
    return "compiled" in getattr(item, "fixturenames", ())


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile in the background, with what the other tests leave of the processor; see compile_only."""
    if session.config.option.collectonly or not any(
        "compiled" in getattr(i, "fixturenames", ()) for i in session.items
    ):
        return
    folder = TemporaryDirectory()
    settings = {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": folder.name, "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "error::UserWarning", "-m", "tests.kernels.compile_only"]
    with open(f"{folder.name}/out", "wb") as out, open(f"{folder.name}/err", "wb") as err:
        process = subprocess.Popen(
            ["nice", *command], cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True
        )
    session.config.stash[COMPILATION] = process, folder


def pytest_unconfigure(config: pytest.Config) -> None:
    """A run that ends early does not leave it behind."""
    if COMPILATION in config.stash:
        process, folder = config.stash[COMPILATION]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        folder.cleanup()


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> str:
    """What the compilation has found: a JSON list of compile_only.Result."""
    pytest.importorskip("triton")
    process, folder = request.config.stash[COMPILATION]
    code = process.wait()
    assert code == 0, Path(folder.name, "err").read_text()
    return Path(folder.name, "out").read_text()
