"""Generation in pipelines and where replicas share out their parameters: one process's tokens, and what is sent."""

from functools import lru_cache
from typing import Any

import pytest
import torch

from tests.distributed import Ranks
from tests.proofs.compositions import VOCABULARY, Composition, double
from tpformer import Mesh, ParallelConfig, trace_communication
from tpformer.models.generate import generate
from tpformer.train.build import build

FP64 = torch.float64
PIPELINE = {"pp": 2, "pp_schedule": "1f1b"}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {  # a model, a layout, its processes
    "zero2": ("llama", {"dp": 2, "dp_mode": "zero2"}, 2),
    "fsdp-tp-sp": ("gpt-tied", {"dp": 2, "tp": 2, "dp_mode": "fsdp", "sequence_parallel": True}, 4),
    "replicas": ("gpt-untied", {"dp": 2}, 2),
    "1f1b": ("llama", PIPELINE, 2),
    "1f1b-tp-sp": ("gpt-tied", PIPELINE | {"tp": 2, "sequence_parallel": True}, 4),
    "1f1b-fsdp": ("llama", PIPELINE | {"dp": 2, "dp_mode": "fsdp"}, 4),
    "interleaved": ("llama", {"pp": 2, "pp_schedule": "interleaved_1f1b", "stages_per_rank": 2}, 2),
    "zbv": ("llama-tied", {"pp": 2, "pp_schedule": "zbv"}, 2),
    "recompute-offload": ("llama", {"recompute": "full", "offload_activations": True}, 1),
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 1.3, "top_k": 50, "seed": 2},
)
Tokens = list[list[list[int]]]


def composition(name: str) -> Composition:
    """One of CASES."""
    model, layout, world_size = CASES[name]
    return Composition(model, ParallelConfig(**layout), 2, FP64, world_size)


def prompts() -> dict[str, torch.Tensor]:
    """Of 4 and of 2 tokens."""
    tokens = torch.randint(VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens, "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])}


def generated(case: Composition) -> Tokens:
    """On a rank, or alone."""
    with double():
        runner = build(case.config(), Mesh.of(case.parallel, "cpu"), VOCABULARY).runner
        return [continued(runner, **options).tolist() for options in OPTIONS]


def continued(runner: Any, **options: Any) -> torch.Tensor:
    """Four tokens more."""
    return generate(runner, max_new_tokens=4, **(prompts() | options))


@lru_cache
def expected(model: str) -> Tokens:
    """Of one process."""
    return generated(Composition(model, ParallelConfig(), 2, FP64))


@pytest.mark.parametrize("name", CASES)
def test_the_tokens_are_one_process_s(name: str, ranks: Ranks) -> None:
    case = composition(name)
    assert len({str(tokens) for tokens in expected(case.model)}) == len(OPTIONS)
    for found in ranks(generated, case.world_size, case):
        assert found == expected(case.model)


def sent(case: Composition) -> list[tuple[str, str, int]]:
    """On a rank: what generating sends."""
    with double():
        runner = build(case.config(), Mesh.of(case.parallel, "cpu"), VOCABULARY).runner
        with trace_communication() as trace:
            continued(runner)
        return [(call.op, call.axis, call.bytes) for call in trace.calls]


def test_a_pipeline_sends_new_tokens_only(ranks: Ranks) -> None:
    """Of each token its activations, from stage to stage, and the last logits from the last stage to all."""
    first, last = ranks(sent, 2, composition("1f1b"))
    for columns, step in zip((4, 1, 1, 1), range(0, 8, 2), strict=True):
        activations, logits = 8 * 2 * columns * 32, 8 * 2 * VOCABULARY
        assert first[step : step + 2] == [("send", "pp", activations), ("broadcast", "pp", logits)]
        assert last[step : step + 2] == [("recv", "pp", activations), ("broadcast", "pp", logits)]
    assert len(first) == len(last) == 8


def complaint(case: Composition) -> list[str]:
    """On a rank: what is said to prompts that do not fit."""
    found = []
    with double():
        runner = build(case.config(), Mesh.of(case.parallel, "cpu"), VOCABULARY).runner
        for wrong in ({"tokens": prompts()["tokens"] + VOCABULARY}, {"tokens": torch.zeros(2, 13, dtype=torch.int64)}):
            with pytest.raises(ValueError, match="must be") as error:
                continued(runner, **wrong, attention_mask=None)
            found.append(str(error.value))
    return found


def test_every_stage_refuses_what_does_not_fit(ranks: Ranks) -> None:
    """Before any waits for another, which would not come."""
    answers = ranks(complaint, 2, composition("1f1b"))
    assert answers[0] == answers[1]
    assert "must be in 0..100" in answers[0][0]
    assert "prompt (13) + max_new_tokens (4) must be at most max_seq_len (16)" in answers[0][1]
