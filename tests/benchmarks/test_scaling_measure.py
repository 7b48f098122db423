"""Who is asked for what, and when: with jobs that are invented, and fail as they are told."""

from typing import Any

import pytest

from benchmarks import scaling_launch, scaling_measure
from benchmarks.scaling_jobs import Job
from benchmarks.scaling_launch import JobError, Launch
from benchmarks.scaling_measure import Effort, Measured, measure
from benchmarks.scaling_presets import PRESETS

MODEL = PRESETS["cpu-tiny"].model


class Invented:
    """Answers as Running does, and notes what it is asked; `fails` says at which question a kind fails."""

    log: list[tuple[str, str]]
    fails: dict[str, str]
    losses: dict[str, float]

    def __init__(self, job: Job, name: str, store: Any, launch: Launch):
        self.job, self.name = job, name
        self.note("start")

    def note(self, what: str) -> None:
        self.log.append((self.job.kind, what))

    def send(self, what: str) -> None:
        self.note(what)

    def answers(self, what: str) -> list[dict[str, Any]]:
        if self.fails.get(self.job.kind) == what:
            raise JobError(f"cannot {what}")
        answer = {
            "gemm_backend": "abacus",
            "loss": self.losses.get(self.job.kind, 5.0) / self.job.degree,
            "first_norm": None,
            "communication": [],
            "peak_bytes": 1,
            "seconds": 0.1 * (1 + len(self.log)),
            "own": 0.0,
            "stood": {"seconds": 1.0, "issued": {}, "waits": ()},
        }
        return [answer] * self.job.processes

    def ask(self, what: str) -> list[dict[str, Any]]:
        self.send(what)
        return self.answers(what)

    def let_go(self) -> None:
        self.note("let go")

    def close(self) -> None:
        self.note("close")


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> type[Invented]:
    monkeypatch.setattr(scaling_measure, "Running", Invented)
    monkeypatch.setattr(scaling_launch, "bytes_available", lambda: 1 << 50)
    Invented.log, Invented.fails, Invented.losses = [], {}, {}
    return Invented


def jobs(*kinds: str) -> list[Job]:
    return [Job(kind, "tp", 2, MODEL, 4, 4) for kind in kinds]


def asked(log: list[tuple[str, str]], what: str) -> list[str]:
    return [kind for kind, question in log if question == what]


def test_together_they_take_turns_backwards_on_odd_rounds(invented: type[Invented]) -> None:
    found = measure(jobs("a", "b", "c"), Effort(rounds=3, warmup=1, exposed=1), Launch("cpu"), lambda _: None)
    assert asked(invented.log, "step") == [*"abc", *"cba", *"abc", *"cba"]
    assert asked(invented.log, "exposed") == [*"cba"]
    assert [len(one.samples) for one in found] == [3, 3, 3]  # the warm-up is none
    assert [one.loss for one in found] == [5.0, 5.0, 5.0]
    first_step = invented.log.index(("a", "step"))
    assert {kind for kind, what in invented.log[:first_step] if what == "memory"} == set("abc")


def test_one_by_one_each_is_alone(invented: type[Invented]) -> None:
    effort = Effort(rounds=2, warmup=1, exposed=1, together=False, passes=2)
    found = measure(jobs("a", "b"), effort, Launch("cpu"), lambda _: None)
    alive: set[str] = set()
    for kind, what in invented.log:
        if what == "start":
            assert not alive
            alive.add(kind)
        elif what == "close":
            alive.discard(kind)
    assert asked(invented.log, "start") == ["a", "b", "b", "a"]
    assert asked(invented.log, "memory") == ["a", "b"]
    assert [len(one.samples) for one in found] == [4, 4]


@pytest.mark.parametrize("where", ["facts", "check", "trace", "memory", "step", "exposed"])
@pytest.mark.parametrize("together", [True, False])
def test_a_job_that_fails_anywhere_is_ended_and_the_others_go_on(
    where: str, together: bool, invented: type[Invented]
) -> None:
    invented.fails = {"b": where}
    said: list[str] = []
    effort = Effort(rounds=2, exposed=1, together=together, passes=2)
    found = measure(jobs("a", "b", "c"), effort, Launch("cpu"), said.append)
    assert [one.error for one in found] == [None, f"cannot {where}", None]
    assert [len(one.samples) for one in found if one.error is None] == [2 if together else 4] * 2
    assert f"b tp=2 failed: cannot {where}" in said
    after = invented.log[invented.log.index(("b", "close")) :]
    assert {what for kind, what in after if kind == "b"} <= {"close", "let go"}


@pytest.mark.parametrize("together", [True, False])
def test_another_model_is_not_timed(together: bool, invented: type[Invented]) -> None:
    invented.losses = {"b": 5.1}
    effort = Effort(rounds=1, together=together, passes=1)
    found = measure(jobs("plain", "b"), effort, Launch("cpu"), lambda _: None)
    assert found[0].error is None
    assert str(found[1].error).startswith("is not the model of plain tp=2: the loss is off by 2.0e-02")
    assert "b" not in asked(invented.log, "step")


def test_everything_is_ended_if_the_parent_is_interrupted(invented: type[Invented]) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("round"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(jobs("a", "b"), Effort(rounds=1), Launch("cpu"), interrupt)
    assert asked(invented.log, "close") == ["a", "b"]


def test_the_median_exposure_is_one_of_those_seen() -> None:
    measured = Measured(jobs("a")[0])
    assert measured.exposure() is None
    measured.exposed = [{"exposed_share": share} for share in (0.3, 0.1, 0.2)]
    assert measured.exposure() == {"exposed_share": 0.2}
