"""kill -9 of any rank under torchrun --max-restarts: the run goes on by itself, its losses bit for bit the same."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed import Ranks
from tests.examples.launch import OF_LLAMA, SMALL, Ended, Launch, launch, pretrain, text_files
from tests.examples.test_killed import lines, losses
from tpformer.train import restart

FLAGS = [*SMALL, *OF_LLAMA, "--tp", "2", "--data", "text", "--dropout", "0.1", "--eval-interval", "7"]
FLAGS += ["--checkpoint-interval", "10", "--warmup-steps", "10"]


ALONE = [*SMALL, *OF_LLAMA, "--data", "text", "--steps", "2"]


def until(condition: Callable[[], bool], started: Launch, seconds: float = 60) -> None:
    """Wait for it, as long as the launch lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert started.process.poll() is None, "it ended before"
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.0005)


def the_run(place: Path) -> Path:
    """The only run, or what will never be there."""
    found = [path for path in (place / "runs").glob("*") if path.name != "peace"]
    assert len(found) < 2, "a restart began another run"
    return found[0] if found else place / "none"


def saving(place: Path) -> bool:
    """Is a checkpoint being written?"""
    with contextlib.suppress(OSError):
        return any((the_run(place) / "checkpoints").glob(".step_*.partial/*"))
    return False


def kill(started: Launch, rank: int) -> dict[int, int]:
    """SIGKILL to one rank; the processes of all ranks as they were."""
    ranks = started.ranks()
    with contextlib.suppress(ProcessLookupError):
        os.kill(ranks[rank], signal.SIGKILL)
    return ranks


def check(ended: Ended, place: Path) -> None:
    """It ended well, and its trace is that of the undisturbed run."""
    assert ended.code == 0, ended.err
    assert ended.left == []
    assert losses(the_run(place)) == losses(place / "runs" / "peace")


def test_a_rank_killed_in_a_step_and_one_killed_while_saving(tmp_path: Path, ranks: Ranks) -> None:
    """Without a name and without --resume: the second and third workers find the run that the first ones began."""
    text_files(tmp_path)
    flags = [*FLAGS, "--steps", "60"]
    assert [code for code, *_ in ranks(pretrain, 2, [*flags, "--name", "peace"], tmp_path)] == [0, 0]
    started = launch(flags, tmp_path, restarts=2)
    until(lambda: len(lines(the_run(tmp_path))) > 15, started)
    before = kill(started, 1)
    until(lambda: not set(started.ranks().values()) & set(before.values()), started)
    until(lambda: saving(tmp_path), started)
    kill(started, 0)
    ended = started.end()
    check(ended, tmp_path)
    assert ended.out.count("writing to") == 1
    assert ended.out.count("resumed at step") == 2
    said = [line for line in ended.err.splitlines() if "pretrain.py: error:" in line]
    assert ["rank 0 lost a peer in" in said[0], "rank 1 lost a peer in" in said[1], len(said)] == [True, True, 2]


def test_a_run_of_somebody_else_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is taken: workers that are started again say so again. Their own run, and no other, they go on with."""
    store = dist.HashStore()
    monkeypatch.setattr(restart, "_launcher_store", lambda: store)
    text_files(tmp_path)
    flags = [*ALONE, "--name"]
    theirs = tmp_path / "runs" / "theirs"
    theirs.mkdir(parents=True)
    (theirs / "config.toml").write_text("")
    for _ in range(2):
        code, _, err = pretrain([*flags, "theirs"], tmp_path)
        assert (code, "holds a run already" in err) == (2, True)
    assert restart.remembered_run() is None
    for said in ("writing to", "resumed at step 2"):
        code, out, err = pretrain([*flags, "ours"], tmp_path)
        assert (code, said in out) == (0, True), err
    assert [path.name for path in theirs.iterdir()] == ["config.toml"]


def test_a_run_killed_before_its_configuration_was_written_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the same name, in the directory that it had made."""
    store = dist.HashStore()
    monkeypatch.setattr(restart, "_launcher_store", lambda: store)
    text_files(tmp_path)
    (tmp_path / "runs" / "early").mkdir(parents=True)
    restart.remember_run(Path("runs/early"))
    code, out, err = pretrain(ALONE, tmp_path)
    assert (code, "writing to runs/early" in out) == (0, True), err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_20_random_moments(tmp_path: Path, ranks: Ranks) -> None:
    """Any rank: in a step, while a checkpoint is written, and while the workers start."""
    text_files(tmp_path)
    flags, moments = [*FLAGS, "--steps", "1200"], random.Random(0)
    assert [code for code, *_ in ranks(pretrain, 2, [*flags, "--name", "peace"], tmp_path, timeout=300)] == [0, 0]
    started = launch(flags, tmp_path, restarts=20)
    for number in range(20):
        until(lambda: len(started.ranks()) == 2, started)
        if number % 4 != 3:  # otherwise at once, in the midst of its start
            written = len(lines(the_run(tmp_path)))
            until(lambda written=written: len(lines(the_run(tmp_path))) > written, started, 120)  # type: ignore[misc]
        if number % 2:
            time.sleep(moments.uniform(0, 0.5 if number % 4 != 3 else 5.0))
        else:
            until(lambda: saving(tmp_path), started)
            time.sleep(moments.uniform(0, 0.004))
        before = kill(started, moments.randrange(2))
        until(lambda before=before: not set(started.ranks().values()) & set(before.values()), started)  # type: ignore[misc]
    ended = started.end(timeout=300)
    check(ended, tmp_path)
    print(ended.out)
