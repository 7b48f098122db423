"""Each warning appears on invented facts that deserve it, and on no others."""

import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.doctor.support import AMPERE, BARE, HEALTHY, HOPPER, NEW, NO_GPU, NO_TRITON, OLD, TURING
from tpformer.doctor import findings as checks
from tpformer.doctor import report
from tpformer.doctor.facts import Facts
from tpformer.doctor.findings import Finding, findings

ROOT = Path(__file__).parents[2]
SET = {"TRITON_PTXAS_PATH": "/elsewhere/ptxas"}
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}
INTERPRETER: dict[str, Any] = {"triton": "3.6.1", "interpreted": True, **NO_GPU}

# a check: the rows that it is about, changes to a healthy machine that it alone sees, and changes that nothing does
CASES: dict[Callable[[Facts], Iterator[Finding]], tuple[set[str], list[dict[str, Any]], list[dict[str, Any]]]] = {
    checks.old_torch: ({"torch"}, [{"torch": "2.10.1+cu130"}], [{"torch": "2.11.0a0+git1"}]),
    checks.old_triton: ({"triton"}, [{"triton": "3.5.1"}], [{"triton": "3.6.0"}, NO_TRITON]),
    checks.numpy_under_the_interpreter: (
        {"triton", "numpy"},
        [INTERPRETER, INTERPRETER | {"numpy": "2.4.0"}],
        [INTERPRETER | {"numpy": "2.3.5"}, INTERPRETER | {"triton": "3.9.0"}, {"triton": "3.6.1"}],
    ),
    checks.interpreted_beside_a_gpu: (
        {"triton"},
        [{"interpreted": True}, {"interpreted": True, "gpus": (), "environment": HIDDEN}],
        [{"interpreted": True, **NO_GPU}],
    ),
    checks.torch_without_cuda: ({"torch", "GPU"}, [{"torch_cuda": None, "gpus": ()}], [{"torch_cuda": None, **NO_GPU}]),
    checks.old_driver: (
        {"driver", "torch"},
        [{"driver_cuda": "12.8", "gpus": ()}, {"driver_cuda": "12.9"}, {"torch_cuda": "14.0"}],
        [{"driver_cuda": "13.1"}, {"torch_cuda": "13.2"}, {"driver_cuda": None}],  # CUDA allows an older minor one
    ),
    checks.unseen_gpu: ({"GPU"}, [{"gpus": ()}], [{"gpus": (), "environment": HIDDEN}]),
    checks.old_gpu: ({"GPU 0"}, [{"gpus": (TURING, AMPERE)}], [{"gpus": (AMPERE, HOPPER)}]),
    checks.miscompiling_ptxas: (
        {"ptxas for sm_90"},
        [{"ptxas": {90: OLD}}, {"ptxas": {90: replace(OLD, version="13.2")}}],
        [
            {"ptxas": {90: replace(OLD, version="13.3")}},
            {"ptxas": {90: OLD}, "gpus": (AMPERE,)},
            {"ptxas": {80: OLD, 90: NEW}},
            {"ptxas": {}},
        ],
    ),
    checks.ignored_ptxas: (
        {"TRITON_PTXAS_PATH", "ptxas for sm_90"},
        [{"environment": SET}],
        [
            {"environment": {"TRITON_PTXAS_PATH": NEW.path}},
            {"environment": SET, "ptxas": {90: replace(NEW, variable="TRITON_PTXAS_BLACKWELL_PATH")}},
        ],
    ),
    checks.no_compiler: (
        {"C compiler"},
        [{"compiler": None}],
        [{"compiler": None, **NO_TRITON}, {"compiler": None, **NO_GPU}],
    ),
    checks.no_headers: (
        {"C compiler"},
        [{"headers": False}],
        [{"headers": None}, {"headers": False, **NO_TRITON}, {"headers": False, **NO_GPU}],
    ),
    checks.unmeasured_table: (
        {"launch table sm_90"},
        [{"tables": {90: None}}],
        [{"tables": {90: None}, **NO_TRITON}],
    ),
    checks.no_peer_access: ({"P2P"}, [{"blocked": ((0, 1),)}], [{"blocked": None}]),
}


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_each_warning_appears_alone_and_only_where_it_is_deserved(check: Callable[..., Iterator[Finding]]) -> None:
    about, bad, fine = CASES[check]
    assert bad
    assert fine
    for facts in (replace(HEALTHY, **changes) for changes in bad):
        found = findings(facts)
        assert found == list(check(facts))
        assert [set(finding.about) for finding in found] == [about], facts
        assert found[0].advice
        assert {line.name for line in report.rows(facts, found) if line.judgement == "warning"} == about
    for facts in (replace(HEALTHY, **changes) for changes in fine):
        assert findings(facts) == [], facts


@pytest.mark.parametrize("facts", [BARE, HEALTHY], ids=["bare", "healthy"])
def test_nothing_is_wrong_where_nothing_is(facts: Facts) -> None:
    assert findings(facts) == []
    assert "warning" not in {line.judgement for line in report.rows(facts, [])}


def test_the_cure_names_the_variable_that_serves_this_gpu() -> None:
    tool = replace(OLD, variable="TRITON_PTXAS_BLACKWELL_PATH")
    finding = findings(replace(HEALTHY, ptxas={90: tool}))[0]
    assert "TRITON_PTXAS_BLACKWELL_PATH" in finding.advice
    assert "driver" not in finding.advice
    older = replace(HEALTHY, ptxas={90: tool}, driver_cuda="12.8", torch_cuda="12.8")
    assert "a driver for CUDA 13" in findings(older)[0].advice


def test_a_long_list_of_pairs_is_cut() -> None:
    blocked = tuple((i, j) for i in range(8) for j in range(i + 1, 8))
    finding = findings(replace(HEALTHY, gpus=(HOPPER,) * 8, blocked=blocked))[0]
    assert "0-6, ...;" in finding.problem
    assert "0-7" not in finding.problem


def test_the_minimums_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"torch>={checks.dotted(checks.MINIMUM_TORCH)}" in project["dependencies"]
    assert project["optional-dependencies"]["triton"] == [f"triton>={checks.dotted(checks.MINIMUM_TRITON)}"]
    assert project["scripts"] == {"tpformer": "tpformer.__main__:main"}


@pytest.mark.parametrize(
    ("version", "expected"), [("2.13.0+cpu", (2, 13, 0)), ("2.12.0a0", (2, 12, 0)), ("13.3", (13, 3)), ("git", ())]
)
def test_numbers_of_a_version(version: str, expected: tuple[int, ...]) -> None:
    assert checks.numbers(version) == expected
