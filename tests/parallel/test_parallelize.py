"""A model that was split by a plan computes what it did: logits, loss, every gradient, and the weights of a step."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

import tpformer
from tests.distributed import Ranks
from tests.parallel.owned import ATTENTION, CASES, HEAD_NORMS, MLP, WHOLE, Case, make, measure_split, measure_whole
from tests.proofs.cases import TOLERANCE, Layout, Measured, mismatches, random_batch

RUNS = [(case, Layout(tp), torch.float64) for case in CASES for tp in (1, 2, 4)]
RUNS += [(case, Layout(2, 2), torch.float64) for case in ("llama", "llama-tied-biases-257-padding", "qwen3", "own")]
RUNS += [(case, Layout(tp), torch.float32) for case in CASES for tp in (2, 4)]

reference = lru_cache(lambda case, dtype: measure_whole(CASES[case], dtype))


def measure(names: list[str], layout: Layout, dtype: torch.dtype) -> dict[str, Measured]:
    """On a rank: several cases."""
    return {name: measure_split(CASES[name], layout, dtype) for name in names}


@lru_cache
def measured(ranks: Ranks, layout: Layout, dtype: torch.dtype) -> list[dict[str, Measured]]:
    """All cases of a layout, by one job."""
    names = [case for case, *run in RUNS if run == [layout, dtype]]
    return ranks(measure, layout.world_size, names, layout, dtype)


@pytest.mark.parametrize(("case", "layout", "dtype"), RUNS, ids=str)
def test_the_split_model_is_the_unsplit_one(case: str, layout: Layout, dtype: torch.dtype, ranks: Ranks) -> None:
    expected = dict(reference(case, dtype))
    if layout.dp > 1:  # each replica has its own
        del expected["logits"], expected["loss"]
    for found in measured(ranks, layout, dtype):
        assert mismatches(expected, found[case], TOLERANCE[dtype]) == []


def counted(plan: dict[str, Any]) -> dict[str, int]:
    """On a rank: the collectives of a forward and backward."""
    model = tpformer.parallelize(make(Case("Llama", plan)), plan, Layout(2).mesh())
    tokens, targets = random_batch(101)
    with tpformer.trace_communication() as trace:
        model(tokens, labels=targets).loss.backward()
    calls = [(call.op, call.axis, call.phase) for call in trace.calls]
    return {" ".join(call): calls.count(call) for call in sorted(set(calls))}


@pytest.mark.parametrize(
    ("plan", "forward", "backward", "gathers"),
    [
        (WHOLE, 2 * 2 + 1, 2 * 2 + 1, 1),  # the embedding's sum; the head's, and its logits
        (ATTENTION, 2, 2, 0),
        (MLP, 2, 2, 0),
    ],
    ids=["whole", "attention", "mlp"],
)
def test_one_sum_a_block_and_direction(
    plan: dict[str, Any], forward: int, backward: int, gathers: int, ranks: Ranks
) -> None:
    """Queries, keys and values share theirs; so do gate and up."""
    expected = {"all_reduce tp backward": backward, "all_reduce tp forward": forward}
    if gathers:
        expected["all_gather tp forward"] = gathers
    assert ranks(counted, 2, plan) == [expected] * 2


def wrong_on_purpose(how: str) -> list[str]:
    """On a rank: what the proof says of a model that was split with one mistake."""
    case = CASES["qwen3"]
    expected = measure_whole(case, torch.float64)
    if how == "a copy whose gradient is partial":
        case = Case(case.family, WHOLE | dict.fromkeys(HEAD_NORMS, "copy"), case.options)
    patch = pytest.MonkeyPatch()
    if how == "columns that do not sum their inputs' gradients":
        patch.setattr("tpformer.parallel.replacements.Enter.__call__", lambda self, x: x)
    if how == "a head that is not entered":
        patch.setattr("tpformer.parallel.replacements.enter_parallel", lambda x, mesh: x)
    if how == "a row that is not summed":
        patch.setattr("tpformer.parallel.replacements.leave_parallel", lambda x, mesh: x)
    with patch.context():
        try:
            return mismatches(expected, measure_split(case, Layout(2), torch.float64), 1e-10)
        except RuntimeError as error:
            return [str(error)]
        finally:
            patch.undo()


@pytest.mark.parametrize(
    "how",
    [
        "a copy whose gradient is partial",
        "columns that do not sum their inputs' gradients",
        "a head that is not entered",
        "a row that is not summed",
    ],
)
def test_the_proof_sees_a_mistake(how: str, ranks: Ranks) -> None:
    for found in ranks(wrong_on_purpose, 2, how):
        assert found
    assert ranks(wrong_on_purpose, 2, "right") == [[], []]


def generated(tp: int) -> list[int]:
    """On a rank: what transformers' own loop makes of the split model."""
    model = make(CASES["llama-tied-biases-257-padding"])
    if tp:
        tpformer.parallelize(model, CASES["llama-tied-biases-257-padding"].plan, Layout(tp).mesh())
    tokens = random_batch(257)[0][:2]
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False).tolist()


def test_transformers_generates_the_same(ranks: Ranks) -> None:
    assert ranks(generated, 2, 2) == [generated(0)] * 2


def retied() -> bool:
    """On a rank: whether tied weights are one parameter, also after transformers ties them again."""
    case = CASES["llama-tied-biases-257-padding"]
    model = tpformer.parallelize(make(case), case.plan, Layout(2).mesh())
    before = model.lm_head.weight
    model.tie_weights()
    return before is model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_weights_stay_one(ranks: Ranks) -> None:
    assert ranks(retied, 2) == [True, True]


def unequal() -> str:
    """On a rank: what a model says that is not the other rank's."""
    mesh = Layout(2).mesh()
    model = make(CASES["own"])
    with torch.no_grad():
        model.head.weight[0] += mesh.tp.rank
    return complaint(lambda: tpformer.parallelize(model, CASES["own"].plan, mesh))


def test_ranks_must_hold_the_same_weights(ranks: Ranks) -> None:
    for found in ranks(unequal, 2):
        assert found.startswith("head.weight differs between ranks of tp, as do 0 more of 15 parameters")


def complaint(call: Callable[[], object]) -> str:
    """The ValueError that it raises."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was raised"
