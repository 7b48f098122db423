"""SIGTERM under torchrun: to one rank, and to torchrun itself, which hands it on."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.examples.launch import OF_LLAMA, SMALL, Ended, launch, text_files
from tests.examples.test_killed import lines


def terminated(place: Path, whom: str) -> Ended:
    """Start a long run, and send the signal once it takes steps."""
    started = launch([*SMALL, *OF_LLAMA, *["--tp", "2", "--steps", "100000", "--data", "text", "--name", "run"]], place)
    deadline = time.monotonic() + 60
    while len(lines(place / "runs" / "run")) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(started.process.pid if whom == "torchrun" else started.ranks()[1], signal.SIGTERM)
    return started.end(timeout=60)


@pytest.mark.parametrize("whom", ["rank 1", "torchrun"])
def test_the_run_is_saved_and_every_rank_ends_with_0(whom: str, tmp_path: Path) -> None:
    """torchrun's own code is 1 if it was told itself: it raises its SignalException once its workers have ended."""
    text_files(tmp_path)
    ended = terminated(tmp_path, whom)
    assert ended.left == []
    assert (ended.code, "SignalException" in ended.err) == ((0, False) if whom == "rank 1" else (1, True)), ended.err
    steps = len(lines(tmp_path / "runs" / "run"))
    assert f"stopped by a signal after step {steps}, which is saved: go on with --resume\n" in ended.out
    assert [p.name for p in (tmp_path / "runs" / "run" / "checkpoints").glob("step_*")] == [f"step_{steps:08d}"]
    for word in ("exitcode", "forcefully", "pretrain.py: error"):  # no rank failed, and none had to be killed
        assert word not in ended.err
