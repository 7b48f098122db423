"""The whole command on a tiny model: what it writes is what it measured, and whatever happens no process stays."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.scaling_jobs import Job
from benchmarks.scaling_launch import JobError, Launch, Running, bytes_needed, check_memory
from benchmarks.scaling_presets import PRESETS

ROOT = Path(__file__).parents[2]
MODEL = PRESETS["cpu-tiny"].model
JOB = Job("tpformer", "tp", 1, MODEL, 4, 4)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, list[str]]:
    """tp 1 and 2 measured, 4 projected, and 3, which does not divide the heads: the record, the output, the files."""
    results = tmp_path_factory.mktemp("results")
    flags = shlex.split("--preset cpu-tiny --axes tp --mode strong --rounds 3 --degrees 1 2 --project tp=3 tp=4")
    command = [sys.executable, "-m", "benchmarks.scaling", *flags, "--device", "cpu", "--results", str(results)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((results / "scaling_cpu-tiny_cpu.json").read_text())
    return record, done.stdout, sorted(path.name for path in results.iterdir())


def test_the_record_says_what_ran_where(ran: tuple[dict[str, Any], str, list[str]]) -> None:
    record, out, files = ran
    assert record["schema_version"] == 1 and record["benchmark"] == "scaling"
    assert {"device", "torch", "python", "commit", "command", "date"} <= record["environment"].keys()
    assert "-m benchmarks.scaling --preset cpu-tiny" in record["environment"]["command"]
    plots = [f"scaling_cpu-tiny_cpu_{name}.png" for name in ("efficiency", "memory", "time")]
    assert files == ["scaling_cpu-tiny_cpu.json", *plots]
    assert "tpformer       tp   strong  2" in out and "PROJECTED with nvlink4" in out
    assert {row["gemm_backend"] for row in record["jobs"] if not row["error"]} != {None}


def test_a_failing_job_is_listed_and_the_others_are_measured(ran: tuple[dict[str, Any], str, list[str]]) -> None:
    record, out, _ = ran
    errors = {row["degree"]: row["error"] for row in record["jobs"]}
    assert errors[1] is errors[2] is errors[4] is None
    assert errors[3] == "ValueError: padded vocabulary (256, for 256) must be divisible by tp (3)"
    assert "tpformer tp=3 PROJECTED failed" in out
    assert record["series"][0]["efficiency"][2] is None


def test_numbers_follow_from_the_samples(ran: tuple[dict[str, Any], str, list[str]]) -> None:
    record = ran[0]
    rows = {row["degree"]: row for row in record["jobs"]}
    times = {}
    for degree in (1, 2):
        samples = rows[degree]["samples"]
        quiet = [s["seconds"] for s in samples if s["other_cores"] is None or s["other_cores"] < 0.12]
        assert len(samples) == 3
        times[degree] = median(quiet if len(quiet) == 3 else [s["seconds"] for s in samples])
        assert rows[degree]["median_ms"] == pytest.approx(1e3 * times[degree])
        assert rows[degree]["tokens_per_second"] == pytest.approx(4 * 32 / times[degree])
        assert len(rows[degree]["peak_memory_bytes"]) == degree
        assert all(peak > 100 << 20 for peak in rows[degree]["peak_memory_bytes"])
    (series,) = record["series"]
    assert series["degrees"] == [1, 2, 3, 4]
    assert series["efficiency"][:2] == pytest.approx([1, times[1] / (2 * times[2])])


def test_the_collectives_are_exactly_megatrons(ran: tuple[dict[str, Any], str, list[str]]) -> None:
    rows = {row["degree"]: row for row in ran[0]["jobs"]}
    assert rows[1]["communication"] == [[]]
    each = {"op": "all_reduce", "axis": "tp", "dtype": "float32", "bytes_each": 4 * 4 * 32 * 64}
    for calls in rows[2]["communication"]:  # of either rank
        activations = [call for call in calls if call["bytes_each"] == each["bytes_each"]]
        assert activations == [each | {"calls": 4 * MODEL.num_layers + 2}]
        assert [(call["op"], call["calls"]) for call in calls if call not in activations] == [("all_gather", 1)]
    exposed = rows[2]["exposed"]
    assert set(exposed["axes"]) == {"tp"} and 0 < exposed["exposed_share"] < 1
    assert 0 <= exposed["idle_share"] <= exposed["exposed_share"]


def test_all_kinds_of_layout_have_the_same_loss(ran: tuple[dict[str, Any], str, list[str]]) -> None:
    rows = {row["degree"]: row for row in ran[0]["jobs"]}
    assert rows[2]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    assert rows[4]["loss"] is None and rows[4]["projection"]["local_ms"] < rows[4]["median_ms"]


@pytest.fixture
def store() -> Iterator[dist.TCPStore]:
    yield dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))


def is_alive(pid: int) -> bool:
    try:
        return b"benchmarks.scaling_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_job_that_dies_is_an_error_and_leaves_nothing(store: dist.TCPStore) -> None:
    running = Running(JOB, "dies", store, Launch("cpu", timeout=100))
    try:
        assert running.ask("facts")[0]["peak_flops"] is None
        pid = int(store.get("dies/pid/0"))
        assert is_alive(pid)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(JobError, match="step: its processes have ended"):
            running.ask("step")
    finally:
        running.close()
    assert not is_alive(pid)


def test_a_job_that_hangs_is_an_error_and_leaves_nothing(store: dist.TCPStore) -> None:
    running = Running(replace(JOB, degree=2), "hangs", store, Launch("cpu", timeout=0.2))
    with pytest.raises(JobError, match=r"facts: no answer in 0\.2 s"):
        running.ask("facts")
    running.close()
    running.close()  # twice is no more than once
    assert running._process.poll() is not None
    workers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    commands = [Path(f"/proc/{pid}/cmdline") for pid in workers if is_alive(pid)]
    assert not any(f'"port": {store.port}'.encode() in path.read_bytes() for path in commands)


def test_a_job_that_memory_cannot_hold_is_not_started() -> None:
    huge = replace(JOB, model=replace(MODEL, hidden_size=1 << 16, ffn_hidden_size=1 << 18), degree=2)
    with pytest.raises(JobError, match=r"needs about .* GiB, and .* are free"):
        check_memory(huge, on_cpu=True)
    check_memory(huge, on_cpu=False)
    check_memory(JOB, on_cpu=True)
    assert bytes_needed(replace(JOB, degree=2)) > bytes_needed(JOB)
