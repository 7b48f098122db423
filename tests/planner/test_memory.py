"""The memory of a rank, as the planner says it, is what is measured, within 5 %: on every rank of every composition."""

import itertools
import math
import timeit
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from tests.distributed import Ranks
from tests.planner.measured import LEAST, MODELS, SIZES, Measured, candidate, measure
from tests.proofs.cases import gpt, llama
from tests.proofs.test_compositions import ROWS
from tpformer import GPTConfig, LlamaConfig, ParallelConfig
from tpformer.parallel import offload
from tpformer.parallel.bubble import schedule_order
from tpformer.parallel.state_bytes import state_bytes
from tpformer.planner import moments
from tpformer.planner.activations import block
from tpformer.planner.alive import alive
from tpformer.planner.candidate import Candidate
from tpformer.planner.memory import PARTS, Memory, explain_memory, memory
from tpformer.planner.sizes import Sizes

COMPILED = [row for row in ROWS if row.parallel.compile]
"""Not measured: on a CPU each operator would be followed, which torch.compile does not allow."""


def case_of(row: Any) -> Candidate:
    """A row of the table of compositions, with a model and tokens that take some memory."""
    return candidate(MODELS[row.model], replace(row.parallel, dp=row.parallel.dp or 1), row.micro_batch_size)


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
    """Its total, what lasts of it, and what does not; for each a prediction of 6 % more or less would be seen."""
    for rank, measured in enumerate(ranks(measure, case.world_size, case)):
        found = memory(case, *place(case, rank))
        assert wrong(found, case, measured) == [], f"rank {rank}\n{explain_memory(found)}"


OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3, wide heads": (llama(**SIZES, num_kv_heads=2, ffn_hidden_size=160, qk_norm=True, head_dim=24), {}),
    "qwen3, a key head for each": (llama(**SIZES, ffn_hidden_size=160, qk_norm=True, qkv_bias=True), {}),
    "mistral": (llama(**SIZES, num_kv_heads=1, ffn_hidden_size=96, sliding_window=16, activation="gelu"), {}),
    "llama, small MLP": (llama(**SIZES, ffn_hidden_size=32), {}),
    "gpt, relu": (gpt(**SIZES, activation="relu"), {}),
    "gpt, small MLP": (gpt(**SIZES, ffn_hidden_size=64), {"recompute": "selective"}),
    "a large vocabulary": (gpt(**SIZES | {"vocab_size": 4096}, tie_embeddings=False), {}),
    "a large vocabulary, bf16": (gpt(**SIZES | {"vocab_size": 4096}), {"precision": "bf16"}),
    "a large vocabulary, fp16": (llama(**SIZES | {"vocab_size": 4096}, ffn_hidden_size=96), {"precision": "fp16"}),
    "fp32 residual": (llama(**SIZES, ffn_hidden_size=160), {"precision": "bf16", "fp32_residual": True}),
    "every third": (llama(**SIZES, ffn_hidden_size=160), {"recompute": "full", "recompute_every": 3}),
    "attention and MLP": (gpt(**SIZES), {"recompute": "selective", "recompute_modules": ("attention", "mlp")}),
    "offload": (gpt(**SIZES), {"offload_activations": True}),
}


@pytest.mark.usefixtures("_small_storages_move")
@pytest.mark.parametrize("which", OTHERS)
def test_other_models_take_what_is_predicted(which: str) -> None:
    """Whatever a block keeps in another way, on one process."""
    model, options = OTHERS[which]
    case = candidate(model, ParallelConfig(dp=1, **options), 4)
    found = memory(case)
    assert wrong(found, case, measure(case)) == [], explain_memory(found)


@pytest.mark.parametrize(
    "left_out", ["MLP activations", "norm outputs", "gradients inside the MLP", "attention output"]
)
def test_a_term_too_few_is_seen(left_out: str) -> None:
    """The control: the rest is more than 5 % off, and says so."""
    case = candidate(MODELS["llama"], ParallelConfig(dp=1), 2)
    measured, found = measure(case), memory(case)
    missing = sum(term.bytes for terms in found.terms.values() for term in terms if term.name == left_out)
    less = replace(found, activations=found.activations - missing)
    assert wrong(found, case, measured) == []
    assert any(line.startswith("the rest") for line in wrong(less, case, measured))


def test_every_number_is_the_product_of_its_factors() -> None:
    """And the table says them all."""
    for case in CASES:
        for pp_rank in range(case.parallel.pp):
            found = memory(case, pp_rank)
            assert list(found.terms) == list(PARTS)
            for part, terms in found.terms.items():
                assert all(one.bytes == math.prod(n for _, n in one.factors) for one in terms)
                assert sum(one.bytes for one in terms) == getattr(found, part), part
            text = explain_memory(found)
            assert all(f"{one.name}: {one}" in text for terms in found.terms.values() for one in terms)


def test_it_follows_state_bytes() -> None:
    """What lasts, and in sharded modes what micro-batches add up, for a model whose rows divide."""
    for options in ({}, {"precision": "bf16"}, {"dp_mode": "zero2"}, {"dp_mode": "fsdp", "precision": "bf16"}):
        parallel = ParallelConfig(dp=4, **options)  # type: ignore[arg-type]
        case = candidate(MODELS["llama"], parallel, 1)
        found, each, count = memory(case), state_bytes(parallel, case.shards, 2), MODELS["llama"].num_parameters()
        lasting = each.weights + each.moments + (each.copy if case.shards == 1 else 0)
        assert found.parameters + found.optimizer == count * lasting
        assert found.gradients == count * (each.accumulated if case.shards > 1 else each.gradients)
    offloaded = candidate(MODELS["llama"], ParallelConfig(dp=1, precision="bf16", offload_optimizer=True), 1)
    assert memory(offloaded).optimizer == 0


def test_what_is_alive_is_counted_in_the_orders() -> None:
    """The closed form against torch's own lists, for every rank."""
    schedules: list[tuple[Any, int]] = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 3)]
    schedules += [("interleaved_zero_bubble", 2), ("zbv", 2), ("dualpipev", 2)]
    for (schedule, stages), pp, count in itertools.product(schedules, (2, 3, 4), range(1, 14)):
        config: Any = ParallelConfig(pp=pp, pp_schedule=schedule, stages_per_rank=stages)
        try:
            orders = schedule_order(config.pp_schedule, pp, count, stages)
        except ValueError:  # not that many micro-batches
            continue
        for rank, actions in enumerate(orders):
            assert alive(config, rank, count) == most_alive(actions), (config, rank, count)


def most_alive(actions: Any) -> tuple[int, ...]:
    """Of each stage, when they are most in all for the first time."""
    now = {action.stage: 0 for action in sorted(actions, key=lambda action: action.stage)}
    most: tuple[int, ...] = ()
    for action in actions:
        now[action.stage] += {"forward": 1, "backward": -1, "input gradient": -1}.get(action.kind, 0)
        if sum(now.values()) > sum(most):
            most = tuple(now.values())
    return most


@pytest.mark.parametrize("parallel", [{}, {"tp": 8, "sequence_parallel": True}], ids=str)
def test_published_bytes_of_a_block(parallel: dict[str, Any]) -> None:
    """34 sbh of arXiv 2205.05198 (equations 1 and 4), less 2 for the masks of dropout, and an fp32 number a query.

    On GPUs in bf16, where each tp rank has its share under sequence parallelism.
    """
    s, b, h, heads, tp = 2048, 4, 4096, 32, parallel.get("tp", 1)
    config = GPTConfig(hidden_size=h, num_heads=heads, max_seq_len=s)
    case = Candidate(config, ParallelConfig(dp=1, precision="bf16", **parallel), s, b, b)
    saved = block(Sizes.of(case), "none", ()).saved
    large = sum(one.bytes for one in saved if "statistics" not in one.name and "log-sum-exp" not in one.name)
    assert large + (2 + 2) * s * b * h // tp == 34 * s * b * h // tp  # with its input, the stream before it
    assert sum(one.bytes for one in saved if "log-sum-exp" in one.name) == 4 * s * b * heads // tp


LARGE = LlamaConfig(hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8, ffn_hidden_size=28672)


def test_a_known_large_model() -> None:
    """Of 70B parameters on 8 GPUs a rank holds an eighth of 18 bytes each; the rest fits no 80 GB, and fsdp's does."""
    options: dict[str, Any] = {"tp": 8, "sequence_parallel": True, "precision": "bf16", "recompute": "full"}
    one = memory(Candidate(LARGE, ParallelConfig(dp=1, **options), 4096, 1, 1))
    assert one.parameters + one.gradients + one.optimizer == pytest.approx(LARGE.num_parameters() / 8 * 18, rel=1e-3)
    shared = memory(Candidate(LARGE, ParallelConfig(dp=64, dp_mode="fsdp", **options), 4096, 64, 1))
    assert shared.total < 20 * 2**30 < 80 * 2**30 < one.total


@pytest.mark.parametrize(
    "options", [{}, {"dp_mode": "fsdp"}, {"pp": 8, "pp_schedule": "interleaved_1f1b", "dp_mode": "zero2"}], ids=str
)
def test_a_call_is_quick(options: dict[str, Any]) -> None:
    """A search makes some 15,000 of them; the best of several, since other processes only slow one down."""
    case = Candidate(LARGE, ParallelConfig(tp=8, dp=8, precision="bf16", **options), 4096, 512, 1)
    memory(case)
    assert min(timeit.repeat(partial(memory, case), number=10, repeat=20)) / 10 < 300e-6


def test_a_rank_that_is_not_there() -> None:
    case = candidate(MODELS["llama"], ParallelConfig(dp=1, pp=2), 2)
    with pytest.raises(ValueError, match=r"pp_rank \(2\) must be in 0..1"):
        memory(case, 2)
    with pytest.raises(ValueError, match=r"tp_rank \(1\) must be in 0..0"):
        memory(case, 0, 1)


def test_what_counts_as_small_is_what_offload_leaves() -> None:
    assert (moments.LEAST_OFFLOADED, moments.AHEAD) == (offload.LEAST_BYTES, offload.AHEAD)
