"""The command: it fits a terminal, says the same as JSON, and runs on a bare machine."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.doctor.support import BARE, HEALTHY, HOPPER, OLD
from tpformer.__main__ import main
from tpformer.doctor import report
from tpformer.doctor.facts import Facts
from tpformer.doctor.findings import findings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("facts", [BARE, HEALTHY, replace(HEALTHY, environment={"NCCL_" + "A" * 40: "x " * 300})])
def test_the_report_fits_a_terminal(facts: Facts) -> None:
    worse = replace(facts, ptxas={90: replace(OLD, path="/" + "a" * 300)}, gpus=(HOPPER,) * 8, compiler=None)
    for case in (facts, worse):
        found = findings(case)
        lines = report.text(report.rows(case, found), found).splitlines()
        assert max(map(len, lines)) <= report.WIDTH
        assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize(("facts", "warnings"), [(BARE, 0), (replace(BARE, torch="2.0"), 1)], ids=["good", "bad"])
def test_the_exit_status(
    facts: Facts, warnings: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "gather", lambda: facts)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"\n{warnings} warning" in text
    assert main(["doctor", "--strict", "--json"]) == warnings
    told = json.loads(capsys.readouterr().out)
    assert len(told["warnings"]) == warnings
    assert all(line["name"] in text for line in told["report"])
    assert {line["judgement"] == "warning" for line in told["report"] if line["name"] == "torch"} == {bool(warnings)}


BARE_MACHINE = """
import sys
sys.modules["triton"] = None
from tpformer.__main__ import main
sys.exit(main(["doctor"]) or main(["doctor", "--json", "--strict"]))
"""


def test_a_bare_machine(tmp_path: Path) -> None:
    """No triton, no compiler, no nvidia-smi, a terminal without letters: a report, and no complaint."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])
    bare = {"PYTHONPATH": path, "PATH": str(tmp_path), "CC": "", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **bare, "PYTHONIOENCODING": "ascii", "NCCL_SOCKET_IFNAME": "\N{GREEK SMALL LETTER PI}"}
    command = [sys.executable, "-W", "error", "-c", BARE_MACHINE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    told = {line["name"]: line for line in json.loads(done.stdout[done.stdout.index("{") :])["report"]}
    assert told["NCCL_SOCKET_IFNAME"]["value"] == "\N{GREEK SMALL LETTER PI}"
    assert told["triton"]["value"] == "not installed: the ops run in plain torch"
    assert told["C compiler"]["judgement"] == "none"
    assert list(tmp_path.iterdir()) == []


def test_a_subcommand_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "command" in capsys.readouterr().err
