"""A run whose processes are all killed goes on with --resume to the losses, bit for bit, of one left in peace."""

import json
import re
import time
from pathlib import Path

import pytest

from tests.distributed import Ranks
from tests.examples.launch import OF_LLAMA, SMALL, launch, pretrain, text_files

STEPS, INTERVAL = 60, 10
FLAGS = [*SMALL, *OF_LLAMA, *f"--tp 2 --steps {STEPS} --checkpoint-interval {INTERVAL} --eval-interval 7".split()]
FLAGS += [
    "--data",
    "text",
    "--dropout",
    "0.1",
    "--attention-dropout",
    "0.1",
    "--micro-batch-size",
    "2",
    "--warmup-steps",
    "10",
]


def lines(run: Path) -> list[str]:
    """The whole lines of metrics.jsonl, also while it is written."""
    path = run / "metrics.jsonl"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def losses(run: Path) -> list[tuple[int, dict[str, float]]]:
    """Step, and everything that was recorded at it but the speed."""
    found = [record for record in map(json.loads, lines(run)) if "checkpoint_step" not in record]
    return [(record.pop("step"), {k: v for k, v in record.items() if k != "tokens_per_second"}) for record in found]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with text in it."""
    text_files(tmp_path)
    return tmp_path


def test_a_killed_run_goes_on_bit_for_bit(place: Path, ranks: Ranks) -> None:
    """SIGKILL to the launcher and to each rank under torchrun, at a step that was not saved."""
    assert [code for code, *_ in ranks(pretrain, 2, [*FLAGS, "--name", "peace"], place)] == [0, 0]
    run = place / "runs" / "war"
    started = launch([*FLAGS, "--name", "war"], place)
    deadline = time.monotonic() + 60
    while len(lines(run)) < 16 and time.monotonic() < deadline:
        time.sleep(0.005)
    started.kill()
    ended = started.end()
    assert ended.left == []
    assert ended.code == -9, ended.err
    assert 16 <= len(lines(run)) < len(lines(place / "runs" / "peace")), "killed before it was done"
    last = launch(["--resume"], place).end()
    assert last.code == 0, last.err
    assert last.left == []
    assert re.search(r"resumed at step [1-9]\d*0\n", last.out)
    assert losses(run) == losses(place / "runs" / "peace")
    assert losses(run)[-1][0] == STEPS
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000050", "step_00000060"]
