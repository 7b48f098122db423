"""Questions to the machine: each asks what it should, and none raises."""

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.doctor.support import BARE
from tpformer.doctor import facts as questions
from tpformer.doctor import findings as checks
from tpformer.doctor import report
from tpformer.doctor.facts import GPU, Ptxas

TOPOLOGY = """
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-51\t0
GPU1\tNV18\t X \tNODE\tSYS\t0-51\t0
GPU2\tSYS\tNODE\t X \tSYS\t52-103\t1
NIC0\tPIX\tSYS\tSYS\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [(TOPOLOGY, ("NV18", "SYS", "NODE")), ("", ()), ("GPU0", ()), ("GPU0 X\nGPU1 NV4", ()), ("no devices X", ())],
    ids=["three", "empty", "cut", "cut row", "other"],
)
def test_links_between_gpus(text: str, expected: tuple[str, ...]) -> None:
    assert questions.links(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021", "470.57.02"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
        ("GCC version:  gcc version 12.2.0", None),
    ],
    ids=["closed", "open", "other"],
)
def test_the_version_of_the_kernel_module(text: str, expected: str | None) -> None:
    assert questions.module_version(text) == expected


def script(path: Path, *lines: str) -> Path:
    """A program for the tests to find."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def test_the_driver_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "nvidia-smi", "echo '580.82.07, NVIDIA H200'", "echo '580.82.07, NVIDIA H200'")
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = questions.gather()
    assert (facts.driver, facts.driver_gpus) == ("580.82.07", ("NVIDIA H200",) * 2)
    if torch.version.cuda is None:
        assert checks.torch_without_cuda in {check for check in checks.CHECKS if list(check(facts))}


def test_torch_is_asked_for_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=2**37, multi_processor_count=132)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: 2 not in (i, j))
    monkeypatch.setattr(questions, "architecture_of", lambda device: 90)
    facts = questions.gather()
    assert facts.gpus == (GPU("NVIDIA H200", 90, 2**37, 132, 90),) * 3
    assert facts.blocked == ((0, 2), (1, 2))
    assert set(facts.tables) == {90}
    lines = {line.name: line.value for line in report.rows(facts, [])}
    assert lines["GPU 2"] == "NVIDIA H200, sm_90, 128.0 GiB, 132 SMs, launch table sm_90"
    assert lines["P2P"] == "between 1 of 3 pairs of GPUs"


def test_triton_is_asked_for_its_ptxas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.backends.nvidia.compiler")
    tool = script(tmp_path / "ptxas", "echo 'Cuda compilation tools, release 13.9, V13.9.1'")
    for variable in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.delenv(variable, raising=False)
    usual = {kind: questions.ptxas(kind) for kind in (80, 90, 100)}
    for kind, before in usual.items():
        assert before is not None
        assert checks.numbers(before.version) >= (12,)
        monkeypatch.setenv(before.variable, str(tool))
        assert questions.ptxas(kind) == Ptxas("13.9", str(tool), before.variable)
        monkeypatch.setenv(before.variable, str(tmp_path / "nothing"))
        environment = {before.variable: str(tmp_path / "nothing")}
        assert questions.ptxas(kind) == before
        assert any(checks.ignored_ptxas(replace(BARE, ptxas={kind: before}, environment=environment)))
        monkeypatch.delenv(before.variable)


@pytest.mark.parametrize(
    ("possible", "speed", "expected"),
    [
        (True, 1.534, "oneDNN, as measured: oneDNN has 1.53 x the speed of torch.mm"),
        (True, 0.5, "torch.mm, as measured: oneDNN has 0.50 x the speed of torch.mm"),
        (False, None, "torch.mm (nothing is known to be faster here)"),
    ],
    ids=["oneDNN", "torch", "no choice"],
)
def test_the_cpu_is_asked_what_multiplies_faster(
    possible: bool, speed: float | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no choice nothing is timed."""
    asked: list[int] = []

    def measure(threads: int) -> float:
        asked.append(threads)
        assert speed is not None
        return speed

    monkeypatch.setattr(questions, "onednn_is_possible", lambda: possible)
    monkeypatch.setattr(questions, "onednn_speed", measure)
    facts = questions.gather()
    assert facts.cpu_matmul == expected
    assert asked == ([torch.get_num_threads()] if possible else [])
    (line,) = [line for line in report.rows(facts, []) if line.name == "fp32 matmul on CPU"]
    assert line.value == expected
    assert expected in " ".join(report.text(report.rows(facts, []), []).split())


def test_a_cpu_that_cannot_be_timed_is_reported_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(threads: int) -> float:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(questions, "onednn_is_possible", lambda: True)
    monkeypatch.setattr(questions, "onednn_speed", fails)
    assert questions.cpu_matmul() is None
    assert report.text(report.rows(replace(BARE, cpu_matmul=None), []), [])


def test_the_compiler_is_the_one_that_triton_would_take(tmp_path: Path) -> None:
    gcc, other = script(tmp_path / "gcc"), script(tmp_path / "other")
    path = {"PATH": str(tmp_path)}
    assert questions.compiler(path) == str(gcc)
    assert questions.compiler({**path, "CC": "other"}) == str(other)
    assert questions.compiler({**path, "CC": "absent"}) is None
    assert questions.compiler({}) is None


def test_a_question_that_fails_is_answered_none() -> None:
    @questions.probe
    def fails(error: type[Exception]) -> int:
        raise error("no")

    @questions.probe
    def warns() -> int:
        warnings.warn("CUDA initialization: the driver is too old", UserWarning, stacklevel=1)
        return 1

    assert [fails(error) for error in (OSError, RuntimeError, AttributeError, StopIteration)] == [None] * 4
    assert warns() == 1
    assert questions.output("a program that is nowhere") is None
    assert questions.gpu(10**6) is None
    assert questions.measured(70) is None


def test_the_environment_is_reported_where_it_matters() -> None:
    environment = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1", "HOME": "/", "A_TORCH_KEY": "secret"}
    facts = questions.gather(environment)
    assert facts.environment == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1"}
    assert [line.name for line in report.rows(facts, []) if line.judgement == "set"] == list(facts.environment)
