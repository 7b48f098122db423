"""What cannot be written ends every rank with one error, at once or at the next save, and leaves the former one."""

import errno
import os
import re
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.cases import load, parts
from tests.distributed import Ranks
from tests.proofs.cases import Layout
from tpformer.checkpoint import chunks as chunks_module
from tpformer.checkpoint import store
from tpformer.checkpoint.background import Checkpoints
from tpformer.checkpoint.store import META, latest_checkpoint

MODEL = "gpt-untied"
MODULES = {"os": os, "store.json": store.json, "store": store, "staging": chunks_module.Staging}


def disk_full(*_: object, **__: object) -> None:
    """As the system says it."""
    raise OSError(errno.ENOSPC, "No space left on device")


def save_with(fault: str, directory: Path, step: int, rank: int, background: bool) -> str:
    """On a rank of 2 x 2: what a save and the wait for it raise, in which something goes wrong on one rank."""
    mesh = Layout(2, 2).mesh()
    here = mesh.world.rank == rank
    checkpoints = Checkpoints(directory, mesh, background=background)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        if here and fault == "full":  # a file may not grow beyond this, for the system itself
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        elif here and fault:
            module, name = fault.rsplit(".", 1)
            patch.setattr(MODULES[module], name, disk_full)
        try:
            checkpoints.save(step, parts(MODEL, mesh, step), {META: {"note": f"step {step}"}})
            checkpoints.wait()
        except OSError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "nothing was raised"


FAULTS = [  # on rank 0, which prepares and publishes; on either tp rank of the first replica, which write
    *(("full", 0), ("full", 1), ("os.pwrite", 1), ("os.fsync", 1), ("staging.copy", 1)),
    *(("os.pwrite", 0), ("os.rename", 0), ("os.fsync", 0), ("store.write_file", 0), ("store.json.dumps", 0)),
]
WAYS = [(*fault, True) for fault in FAULTS] + [(*FAULTS[number], False) for number in (1, 2, 6)]  # in the background?


@pytest.mark.parametrize(("fault", "rank", "background"), WAYS)
def test_a_full_disk_ends_every_rank_and_the_former_one_stays(
    fault: str, rank: int, background: bool, tmp_path: Path, ranks: Ranks
) -> None:
    """An OSError with one text; nothing half written is left; and with space again, saving works again."""
    assert set(ranks(save_with, 4, "", tmp_path, 1, 0, background)) == {"nothing was raised"}
    errors = ranks(save_with, 4, fault, tmp_path, 2, rank, background)
    assert len({error.removeprefix("[Errno 28] ") for error in errors}) == 1, errors
    assert re.search("File too large" if fault == "full" else "No space left", errors[0])
    if fault in ("full", "os.pwrite"):
        assert ".step_00000002.partial/" in errors[0], "which file it was"
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000001"
    assert ranks(load, 2, Layout(2), [tmp_path / "step_00000001"], 1, MODEL) == [[[]], [[]]]
    assert set(ranks(save_with, 4, "", tmp_path, 2, 0, background)) == {"nothing was raised"}
    assert ranks(load, 2, Layout(2), [tmp_path / "step_00000002"], 2, MODEL) == [[[]], [[]]]


def test_a_directory_that_cannot_be_made_ends_every_rank(tmp_path: Path, ranks: Ranks) -> None:
    (tmp_path / "file").write_text("in the way")
    for background in (False, True):
        errors = ranks(save_with, 4, "", tmp_path / "file", 1, 0, background)
        assert all("Not a directory" in error for error in errors), errors
    assert (tmp_path / "file").read_text() == "in the way"


def errors_of_three_saves(directory: Path) -> list[str]:
    """On a rank of two, of which one has no space for the first: what each save and the last wait raise."""
    mesh = Layout(2).mesh()
    checkpoints = Checkpoints(directory, mesh)
    found = []

    def attempt(action: Any, *arguments: Any) -> None:
        try:
            action(*arguments)
            found.append("")
        except OSError as error:
            found.append(str(error))

    with pytest.MonkeyPatch.context() as patch:
        if mesh.world.rank == 1:
            patch.setattr(os, "pwrite", disk_full)
        attempt(checkpoints.save, 1, parts(MODEL, mesh, 1), {})
        while any(thread.name.startswith("checkpoint") for thread in threading.enumerate()):
            time.sleep(0.01)
    attempt(checkpoints.save, 2, parts(MODEL, mesh, 2), {})
    attempt(checkpoints.save, 3, parts(MODEL, mesh, 3), {})
    attempt(checkpoints.wait)
    return found


def test_an_error_in_the_background_is_the_next_save_s_and_only_its(tmp_path: Path, ranks: Ranks) -> None:
    """That save is not made: who catches the error may save again."""
    first, second = ranks(errors_of_three_saves, 2, tmp_path)
    assert first == second
    assert [bool(error) for error in first] == [False, True, False, False]
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]


def with_a_death(directory: Path) -> None:
    """On a rank of two, of which one dies in the middle of the writing: the other notes what its wait raises."""
    mesh = Layout(2).mesh()
    checkpoints = Checkpoints(directory / "checkpoints", mesh)
    checkpoints.save(1, parts(MODEL, mesh, 1), {META: {"note": "step 1"}})
    checkpoints.wait()
    if mesh.world.rank == 1:
        os.pwrite = lambda *_: os._exit(9)
    checkpoints.save(2, parts(MODEL, mesh, 2), {})
    try:
        checkpoints.wait()
    except RuntimeError as error:
        (directory / "said").write_text(str(error))


def test_the_death_of_a_writer_ends_the_others_and_the_former_one_stays(tmp_path: Path, ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match=r"rank 1: the process died with exit code 9"):
        ranks(with_a_death, 2, tmp_path)
    assert "peer" in (tmp_path / "said").read_text()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert ranks(load, 1, Layout(1), [tmp_path / "checkpoints" / "step_00000001"], 1, MODEL) == [[[]]]
