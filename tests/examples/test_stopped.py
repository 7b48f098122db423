"""Signals under torchrun: SIGTERM to one rank or to torchrun, which hands it on; SIGSTOP, by which a rank hangs."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.examples.launch import OF_LLAMA, SMALL, Ended, Launch, launch, text_files
from tests.examples.test_killed import lines


def under_way(place: Path, *options: str) -> Launch:
    """A long run that takes steps."""
    text_files(place)
    flags = [*SMALL, *OF_LLAMA, "--tp", "2", "--steps", "100000", "--data", "text", "--name", "run"]
    started = launch([*flags, *options], place)
    deadline = time.monotonic() + 60
    while len(lines(place / "runs" / "run")) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    return started


def terminated(place: Path, whom: str) -> Ended:
    """How a run ends that is told to."""
    started = under_way(place)
    os.kill(started.process.pid if whom == "torchrun" else started.ranks()[1], signal.SIGTERM)
    return started.end(timeout=60)


@pytest.mark.parametrize("whom", ["rank 1", "torchrun"])
def test_the_run_is_saved_and_every_rank_ends_with_0(whom: str, tmp_path: Path) -> None:
    """torchrun's own code is 1 if it was told itself: it raises its SignalException once its workers have ended."""
    ended = terminated(tmp_path, whom)
    assert ended.left == []
    assert (ended.code, "SignalException" in ended.err) == ((0, False) if whom == "rank 1" else (1, True)), ended.err
    steps = sum('"loss"' in line for line in lines(tmp_path / "runs" / "run"))
    assert f"stopped by a signal after step {steps}, which is saved: go on with --resume\n" in ended.out
    assert [p.name for p in (tmp_path / "runs" / "run" / "checkpoints").glob("step_*")] == [f"step_{steps:08d}"]
    for word in ("exitcode", "forcefully", "pretrain.py: error"):  # no rank failed, and none had to be killed
        assert word not in ended.err


def test_a_rank_that_hangs_ends_the_other_within_the_time_out(tmp_path: Path) -> None:
    """And so the run: torchrun gives the one that hangs 30 s more, which are not waited for here."""
    started = under_way(tmp_path, "--timeout-seconds", "2")
    ranks = started.ranks()
    os.kill(ranks[1], signal.SIGSTOP)
    stopped = time.monotonic()
    while ranks[0] in started.alive() and time.monotonic() < stopped + 30:
        time.sleep(0.02)
    seconds = time.monotonic() - stopped
    started.kill()
    err = started.end().err
    line = (
        r"error: rank 0 waited 2 s for all_\w+ on tp \(2 ranks\), issued at \w+/\w+\.py:\d+.*, after \d+ steps: another"
    )
    assert re.search(line, err), err
    assert 1.9 < seconds < 4
