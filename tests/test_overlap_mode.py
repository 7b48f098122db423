"""How matmuls meet their communication: the choice, on every rank the same; what is said of it; what is refused."""

import gc
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.distributed import Ranks
from tpformer import Llama, LlamaConfig, Mesh, symmetric_memory, trace_communication
from tpformer.mesh import Overlap
from tpformer.overlap import overlap_mode
from tpformer.symmetric_memory import Place, unreachable

Answers = list[tuple[str, str, int]]  # of each case: the mode or the error, what was logged, how often it was asked
NO_NVLINK = "no NVLink between GPUs 0 and 1"


def choose(cases: list[tuple[Overlap, str, str]]) -> Answers:
    """Two calls a case, of an overlap, a kind of device and what symmetric memory lacks there."""
    answers = []
    created = Mesh.create(tp=2, sequence_parallel=True)
    for wanted, device, lacking in cases:
        mesh = replace(created, overlap=wanted, device=torch.device(device))
        asked: list[int] = []
        said: list[str] = []

        def missing(group: Any, device: Any, asked: list[int] = asked, lacking: str = lacking) -> str:
            asked.append(group.size())
            return lacking

        with patch.object(symmetric_memory, "missing", missing), listening(said):
            results = {attempt(mesh), attempt(mesh)}
        assert set(asked) <= {2}
        answers.append((results.pop(), "; ".join(said), len(asked)))
        assert not results
    return answers


def attempt(mesh: Mesh) -> str:
    try:
        return overlap_mode(mesh)
    except ValueError as error:
        return f"ValueError: {error}"


class listening(logging.Handler):
    """Collect what the library logs, within a `with`."""

    def __init__(self, said: list[str]):
        super().__init__()
        self.said, self.logger = said, logging.getLogger("tpformer")

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def __enter__(self) -> None:
        self.level_before = self.logger.level
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)

    def __exit__(self, *error: object) -> None:
        self.logger.setLevel(self.level_before)
        self.logger.removeHandler(self)


REFUSED = (
    "ValueError: overlap ('symm_mem') is not available: no NVLink between GPUs 0 and 1; use 'auto', 'chunked' or 'off'"
)
CASES: dict[tuple[Overlap, str, str], tuple[str, str, int]] = {
    ("auto", "cpu", ""): ("plain", "matmuls and their communication take turns (overlap 'auto' on cpu)", 0),
    ("off", "cpu", ""): ("plain", "matmuls and their communication take turns (overlap 'off' on cpu)", 0),
    ("chunked", "cpu", ""): ("chunked", "matmuls overlap with their communication by chunks (overlap 'chunked'", 0),
    ("symm_mem", "cpu", NO_NVLINK): (REFUSED, "", 1),
    ("auto", "cuda:0", ""): ("symm_mem", "matmuls overlap with their communication through symmetric memory", 1),
    ("symm_mem", "cuda:0", ""): ("symm_mem", "matmuls overlap with their communication through symmetric memory", 1),
    ("chunked", "cuda:0", ""): ("chunked", "matmuls overlap with their communication by chunks", 0),
    ("off", "cuda:0", ""): ("plain", "matmuls and their communication take turns (overlap 'off' on cuda)", 0),
}
ELSEWHERE: dict[tuple[Overlap, str, str], tuple[str, str, int]] = {
    ("auto", "cuda:0", NO_NVLINK): (
        "chunked",
        "matmuls overlap with their communication by chunks (no NVLink between GPUs 0 and 1)",
        1,
    ),
    ("symm_mem", "cuda:0", NO_NVLINK): (REFUSED, "", 1),
}


@pytest.mark.parametrize("cases", [CASES, ELSEWHERE], ids=["where there is NVLink", "where there is none"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_choice(ranks: Ranks, world_size: int, cases: dict[tuple[Overlap, str, str], tuple[str, str, int]]) -> None:
    """Asked once a group, said once, by one rank; groups of earlier processes, of the same names, are forgotten."""
    for rank, answers in enumerate(ranks(choose, world_size, list(cases))):
        for (mode, said, asked), (right, message, times) in zip(answers, cases.values(), strict=True):
            assert mode == right
            assert asked == times  # a refusal too is asked for once, and raised each time
            if rank == 0 and message:
                assert said.startswith(f"tensor parallelism over tp=2: {message}")
                assert ";" not in said
            else:
                assert said == ""


def alone(wanted: Overlap) -> str:
    with patch.object(symmetric_memory, "missing", None):
        return overlap_mode(Mesh(sequence_parallel=True, overlap=wanted, device=torch.device("cuda", 0)))


@pytest.mark.parametrize("wanted", ["auto", "symm_mem", "chunked", "off"])
def test_alone_there_is_nothing_to_choose(wanted: Overlap) -> None:
    assert alone(wanted) == "plain"


def refuse_on_a_cpu() -> tuple[str, list[str]]:
    mesh = Mesh.create(tp=4, sequence_parallel=True, overlap="symm_mem")
    with trace_communication() as trace:
        attempt(mesh)
        asked = [call.op for call in trace.calls]
        assert attempt(mesh) == attempt(mesh)
    assert len(trace.calls) == len(asked)
    return attempt(mesh), asked


def test_symmetric_memory_without_gpus_is_refused_by_every_rank(ranks: Ranks) -> None:
    """Nothing is invented here: the places are exchanged, then the complaints, and there is no trial."""
    for message, asked in ranks(refuse_on_a_cpu, 4):
        assert message.startswith("ValueError: overlap ('symm_mem') is not available: rank 0 computes on a CPU; use")
        assert asked == ["all_gather", "all_gather"]


def build_a_model() -> str:
    mesh = Mesh.create(tp=2, sequence_parallel=True, overlap="symm_mem")
    config = LlamaConfig(vocab_size=128, hidden_size=16, ffn_hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2)
    try:
        Llama(config, mesh)
    except ValueError as error:
        return str(error)
    return "built"


def test_the_question_is_put_while_a_model_is_built_on_the_meta_device(ranks: Ranks) -> None:
    for answer in ranks(build_a_model, 2):
        assert answer.startswith("overlap ('symm_mem') is not available: rank 0 computes on a CPU")


def complain(hardware: dict[int, str], trial: dict[int, str]) -> tuple[str, int]:
    """What this rank hears, if some ranks have complaints, and whether it joined the trial."""
    mesh, joined = Mesh.create(tp=4), []

    def try_it(group: Any) -> str:
        joined.append(group)
        return trial.get(mesh.tp.rank, "")

    with (
        patch.object(symmetric_memory, "_hardware", lambda places, rank: hardware.get(rank, "")),
        patch.object(symmetric_memory, "_trial", try_it),
    ):
        assert mesh.tp.group is not None
        return symmetric_memory.missing(mesh.tp.group, mesh.device), len(joined)


@pytest.mark.parametrize(
    ("hardware", "trial", "heard", "joined"),
    [
        ({}, {}, "", 1),
        ({2: "no NVLink"}, {}, "no NVLink", 0),
        ({1: "first", 3: "second"}, {0: "not reached"}, "first", 0),
        ({}, {3: "refused"}, "refused", 1),
    ],
)
def test_every_rank_hears_of_one_rank_s_complaint(
    ranks: Ranks, hardware: dict[int, str], trial: dict[int, str], heard: str, joined: int
) -> None:
    assert ranks(complain, 4, hardware, trial) == [(heard, joined)] * 4


def hold() -> bool:
    mesh = Mesh.create(tp=2, sequence_parallel=True)
    assert mesh.tp.group is not None
    group = weakref.ref(mesh.tp.group)
    overlap_mode(mesh)
    dist.barrier()
    mesh.close()
    del mesh
    gc.collect()
    return group() is None


def test_the_choice_keeps_no_process_group_alive(ranks: Ranks) -> None:
    assert ranks(hold, 2) == [True, True]


def yes(i: int, j: int) -> bool:
    return True


A, B, C = (Place("node", gpu) for gpu in "abc")
SEEN, LINKED = ["b", "a", "c"], [[0, 18, 18], [18, 0, 18], [18, 18, 0]]


@pytest.mark.parametrize(
    ("places", "visible", "peer_access", "nvlinks", "expected"),
    [
        ([A, B, C], SEEN, yes, LINKED, ""),
        ([A], ["a"], yes, [], ""),
        ([Place("node", "")], [], yes, [], "rank 0 computes on a CPU"),
        ([A, Place("other", "b")], SEEN, yes, LINKED, "ranks 0 and 1 are on two hosts, node and other"),
        ([A, A], SEEN, yes, LINKED, "ranks 0 and 1 share one GPU"),
        ([A, B], ["a"], yes, [[0]], "rank 0 does not see the GPU of rank 1 (is CUDA_VISIBLE_DEVICES set for each rank"),
        ([A, Place("node", "")], SEEN, yes, LINKED, "rank 0 does not see the GPU of rank 1"),
        ([A, B, C], SEEN, lambda i, j: (i, j) != (2, 1), LINKED, "no peer access between GPUs 1 and 2"),
        ([A, B, C], SEEN, lambda i, j: (i, j) != (1, 2), LINKED, "no peer access between GPUs 1 and 2"),
        ([A, B, C], SEEN, yes, [[0, 18, 0], [18, 0, 0], [0, 0, 0]], "no NVLink between GPUs 1 and 2"),
    ],
)
def test_what_keeps_a_rank_from_its_peers_is_named(
    places: Sequence[Place],
    visible: list[str],
    peer_access: Callable[[int, int], bool],
    nvlinks: list[list[int]],
    expected: str,
) -> None:
    """The processes' own numbers: rank 0 is on GPU 1 of those that it sees."""
    found = unreachable(places, 0, visible, peer_access, nvlinks)
    assert found.startswith(expected)
    assert bool(found) == bool(expected)
