"""A rank that dies or hangs in a step: every other ends within the time-out and says for what it waited."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.cases import parts
from tests.proofs.cases import Layout
from tests.proofs.compositions import VOCABULARY, Composition, batch
from tests.train.forked import Fault, FaultyTrace, Survivor, forked
from tpformer import Mesh, ParallelConfig
from tpformer.checkpoint.background import Checkpoints
from tpformer.checkpoint.storage import SafetensorsWriter
from tpformer.train.build import build
from tpformer.train.lost_ranks import Watchdog, naming_lost_ranks, pending_entries, waiting
from tpformer.train.step import StepOptions, train_step

SECONDS = 1.5
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
TP2, SP2 = ParallelConfig(tp=2), ParallelConfig(tp=2, sequence_parallel=True)
DP2, FSDP2 = ParallelConfig(dp=2), ParallelConfig(dp=2, dp_mode="fsdp")
PP2 = ParallelConfig(pp=2)


@pytest.fixture(scope="module")
def alone() -> Iterator[ProcessPoolExecutor]:
    """A process with one thread, to be forked."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def steps(rank: int, parallel: ParallelConfig, fault: Fault, limits: tuple[float, float] = (SECONDS, 600.0)) -> None:
    """On a rank: three steps, in the second of which the last rank meets with the fault.

    limits: the watchdog's, and the process groups' own.
    """
    mesh = Mesh.of(parallel, "cpu", timeout_seconds=limits[1])
    built = build(Composition("llama", parallel).config(), mesh, VOCABULARY)
    last = rank == mesh.world.size - 1
    samples = batch(0).chunk(mesh.dp.size)[mesh.dp.rank]
    done = 0

    def when() -> str:
        return f"in step {done + 1}"

    with naming_lost_ranks(rank, when), Watchdog(limits[0], rank, when) as watchdog:
        for done in range(3):
            with FaultyTrace(fault) if last and done == 1 else nullcontext():
                train_step(built.runner, built.gradients, built.optimizer, samples, StepOptions(2, 0.01))
            watchdog.beat()


def run(parallel: ParallelConfig, fault: Fault, *limits: tuple[float, float]) -> list[Survivor]:
    """In the process that is forked."""
    return forked(steps, parallel.pp * parallel.tp * (parallel.dp or 1), parallel, fault, *limits)


CASES = {
    "tp, forward": (TP2, "all_reduce", "tp", "forward", r"all_reduce on tp \(2 ranks\), issued at layers/\w+\.py:\d+"),
    "tp, backward": (
        TP2,
        "all_reduce",
        "tp",
        "backward",
        r"all_reduce on tp \(2 ranks\), issued at layers/\w+\.py:\d+ in backward",
    ),
    "sp, backward": (
        SP2,
        "reduce_scatter",
        "tp",
        "backward",
        r"(reduce_scatter|all_gather) on tp \(2 ranks\), issued at layers/\w+\.py:\d+ in backward",  # both travel
    ),
    "dp": (DP2, "all_reduce", "dp", "backward", r"all_reduce on dp \(2 ranks\), issued at parallel/data\.py:\d+"),
    "fsdp, forward": (FSDP2, "all_gather", "dp", "forward", r"all_gather on dp \(2 ranks\), issued at models/\w+\.py"),
    "fsdp, backward": (
        FSDP2,
        "reduce_scatter",
        "dp",
        "backward",
        r"(reduce_scatter|all_gather) on dp \(2 ranks\), issued",
    ),
    "pp": (PP2, "recv", "pp", "forward", r"(send|recv) on pp \(2 ranks\), issued at parallel/pipeline\.py:\d+"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", [KILL, STOP], ids=lambda how: signal.Signals(how).name)
def test_the_other_rank_says_for_what_it_waited(name: str, how: int, alone: ProcessPoolExecutor) -> None:
    parallel, op, axis, phase, expected = CASES[name]
    (survivor,) = alone.submit(run, parallel, Fault(how, op, axis, phase, skip=name != "dp")).result()
    assert survivor.code == 1, survivor
    (line,) = [line for line in survivor.err.splitlines() if "rank 0" in line]
    assert re.search(expected, line), line
    assert "in step 2: another rank" in line
    if how == KILL:
        assert "rank 0 lost a peer in" in line
        assert survivor.seconds < 2
    else:
        assert "rank 0 waited" in line
        assert SECONDS - 1 < survivor.seconds < SECONDS + 2  # the last beat came before the fault


def saving(rank: int, directory: Path, how: int) -> None:
    """On a rank: a save in the background, in which the last one meets with the fault, and the wait for it."""
    mesh = Layout(2).mesh()
    checkpoints = Checkpoints(directory, mesh)
    if rank == mesh.world.size - 1:
        write: Any = SafetensorsWriter
        write.write_data = lambda *_: os.kill(os.getpid(), how)
    with naming_lost_ranks(rank, lambda: "in step 2"), Watchdog(SECONDS, rank, lambda: "in step 2"):
        checkpoints.save(1, parts("gpt-untied", mesh, 1), {})
        checkpoints.wait()


def save_with(directory: Path, how: int) -> list[Survivor]:
    """In the process that is forked."""
    return forked(saving, 2, directory, how)


@pytest.mark.parametrize("how", [KILL, STOP], ids=lambda how: signal.Signals(how).name)
def test_lost_in_the_background_s_save(how: int, alone: ProcessPoolExecutor, tmp_path: Path) -> None:
    """The main thread waits for its own other thread: the line says for what that one waits."""
    (survivor,) = alone.submit(save_with, tmp_path, how).result()
    assert survivor.code == 1, survivor
    expected = r"(waited \d s for|lost a peer in) \w+ on checkpoint \(2 ranks\), issued at checkpoint/storage\.py:\d+"
    assert re.search(expected + ", in step 2: another rank", survivor.err), survivor.err


@pytest.mark.parametrize(
    ("path", "foreign"),
    [
        ("/home/me/tpformer/layers/linear.py", False),
        ("/opt/lib/python3.11/site-packages/tpformer/layers/linear.py", False),
        ("/opt/lib/python3.11/site-packages/torch/nn/modules/module.py", True),
        ("/src/torch/nn/modules/module.py", True),
        ("/opt/lib/python3.11/threading.py", True),
        ("<string>", True),
    ],
)
def test_call_sites_are_this_library_s_wherever_it_is_installed(path: str, foreign: bool) -> None:
    code = compile("import sys\nframe = sys._getframe()", path, "exec")
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert (waiting([(scope["frame"], 7)]).site == "?") == foreign


def test_every_rank_of_four_ends(alone: ProcessPoolExecutor) -> None:
    """Those too that have no group with the rank that died: the end of one is the end of the next."""
    found = alone.submit(run, ParallelConfig(tp=2, dp=2), Fault(KILL, "all_reduce", "tp", "forward")).result()
    assert [survivor.code for survivor in found] == [1, 1, 1], found
    for rank, survivor in enumerate(found):
        assert re.search(rf"rank {rank} lost a peer in all_reduce on (tp|dp|world) \(\d ranks\), issued", survivor.err)
        assert survivor.seconds < 2


def test_a_process_group_that_gives_up_first_says_the_same(alone: ProcessPoolExecutor) -> None:
    """gloo's own time-out, which is also that of groups that torch made later with another one."""
    fault = Fault(STOP, "all_reduce", "tp", "forward")
    found = alone.submit(run, ParallelConfig(tp=2, dp=2), fault, (60.0, 1.0)).result()
    assert [survivor.code for survivor in found] == [1, 1, 1], found
    line = (
        r"rank 2 gave up waiting for all_reduce on tp \(2 ranks\), issued at layers/\w+.py:\d+, in step 2: another rank"
    )
    assert re.search(line, found[2].err), found[2].err
    assert all(survivor.seconds < 6 for survivor in found)


def test_a_rank_that_hangs_by_itself_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of torch's is waited for: the line says where it stands."""
    lines: list[str] = []
    with Watchdog(0.2, 3, lambda: "in step 7", lines.append):
        time.sleep(0.5)
    (line,) = lines
    assert re.fullmatch(
        r"rank 3 waited \d s for no collective of this rank, issued at train/test_lost_ranks.py:\d+, in step 7: "
        r"this rank hangs",
        line,
    )


def test_it_is_silent_as_long_as_something_ends() -> None:
    """Also after it was left, and when it is entered again."""
    lines: list[str] = []
    watchdog = Watchdog(0.3, 0, lambda: "", lines.append)
    for _ in range(2):
        with watchdog:
            for _ in range(10):
                time.sleep(0.06)
                watchdog.beat()
        time.sleep(0.4)
    assert lines == []


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("gloo")], ids=str
)
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, naming_lost_ranks(0, lambda: ""):
        raise error
    assert raised.value is error


def test_what_nccl_has_not_finished() -> None:
    """As torch's flight recorder writes it, by its documentation; it has not been seen on GPUs."""
    entries = [
        {"state": "completed", "profiling_name": "nccl:all_gather", "process_group": ["1", "mesh_tp"]},
        {"state": "started", "profiling_name": "nccl:reduce_scatter", "process_group": ["2", "mesh_dp"]},
    ]
    assert pending_entries(json.dumps({"entries": entries})) == ", on the device reduce_scatter on dp"
    assert pending_entries(json.dumps({"entries": entries[:1]})) == ""
    assert pending_entries(b"{}") == ""
