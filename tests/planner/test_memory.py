"""The memory of a rank, as the planner says it, is what is measured, within 5 %: on every rank of every composition."""

from dataclasses import replace
from typing import Any

import pytest

from tests.distributed import Ranks
from tests.planner.measured import LEAST, MODELS, Measured, candidate, measure
from tests.proofs.test_compositions import ROWS
from tpformer import ParallelConfig
from tpformer.planner import moments
from tpformer.planner.candidate import Candidate
from tpformer.planner.memory import Memory, explain_memory, memory

COMPILED = [row for row in ROWS if row.parallel.compile]
"""Not measured: on a CPU each operator would be followed, which torch.compile does not allow."""


def case_of(row: Any) -> Candidate:
    """A row of the table of compositions, with a model and tokens that take some memory."""
    parallel = replace(row.parallel, dp=row.parallel.dp or 1)
    model = "llama" if row.model == "llama-uneven" else row.model
    return candidate(model, parallel, row.micro_batch_size)


CASES = [case_of(row) for row in ROWS if row not in COMPILED]


def place(case: Candidate, rank: int) -> tuple[int, int]:
    """The coordinates of a process on pp and tp."""
    p = case.parallel
    return rank // (case.dp * p.tp), rank % p.tp


@pytest.fixture
def _small_storages_move(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Here as on the ranks."""
    monkeypatch.setattr(moments, "LEAST_OFFLOADED", LEAST)
    moments.stage_moments.cache_clear()
    yield
    moments.stage_moments.cache_clear()


def rest(found: Memory, case: Candidate) -> int:
    """What is not there from step to step."""
    return found.activations + found.buffers + (found.gradients if case.shards > 1 else 0)


def wrong(found: Memory, case: Candidate, measured: Measured) -> list[str]:
    """What is more than 5 % off."""
    ours = {
        "parameters": found.parameters,
        "gradients": 0 if case.shards > 1 else found.gradients,
        "optimizer": found.optimizer,
        "the rest": rest(found, case),
        "the total": found.total,
    }
    return [f"{name}: {ours[name]} not {n}" for name, n in measured.items() if abs(ours[name] - n) > 0.05 * n]


def name(case: Candidate) -> str:
    """Of a test."""
    p, plain = case.parallel, ParallelConfig()
    chosen = [f"{key}={x}" for key, x in vars(p).items() if x != getattr(plain, key)]
    model = next(key for key, model in MODELS.items() if model == case.model)
    return " ".join([model, *chosen, f"mb={case.micro_batch_size}"])


@pytest.mark.usefixtures("_small_storages_move")
@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_rank_takes_what_is_predicted(case: Candidate, ranks: Ranks) -> None:
    """Its total, what lasts of it, and what does not."""
    for rank, measured in enumerate(ranks(measure, case.world_size, case)):
        found = memory(case, *place(case, rank))
        assert wrong(found, case, measured) == [], f"rank {rank}\n{explain_memory(found)}"
