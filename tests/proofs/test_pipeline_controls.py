"""What would make a pipeline silently wrong is seen by the comparison that the compositions pass."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.distributed import Ranks
from tests.proofs.cases import Measured, mismatches
from tests.proofs.compositions import VOCABULARY, Composition, double, steps, train
from tpformer import Axis, Mesh, ParallelConfig
from tpformer.parallel.pipeline import Pipeline
from tpformer.train.build import Training, build
from tpformer.train.optimizer import Optimizer

Mistake = Callable[[Training], Any]


def forgets_the_tied_gradient(built: Training) -> None:
    """Each end of the model updates its own copy of the embedding."""
    built.runner.sum_tied = lambda gradients: None


def leaves_out_the_micro_batch_scale(built: Training) -> None:
    """The gradients of the micro-batches are added, and not averaged."""
    backward = built.runner.backward

    def unscaled(samples: Any, *, scale: float = 1.0, **options: Any) -> Any:
        return backward(samples, scale=scale * built.runner.batches.count, **options)

    built.runner.backward = unscaled


def norm_misses_a_stage(built: Training) -> None:
    """Each stage clips by what it has itself."""
    built.optimizer.mesh = replace(built.optimizer.mesh, world=Axis("world"))


def loses_what_was_postponed(built: Training) -> None:
    """The first stage's weights' gradients of one micro-batch are never computed."""
    stage = built.runner._scheduled[0]
    later = stage.backward_weight_one_chunk

    def forgetful(chunk: int, *args: Any, **kwargs: Any) -> None:
        if chunk == 2:
            stage.dw_runner[chunk] = lambda: None
        later(chunk, *args, **kwargs)

    stage.backward_weight_one_chunk = forgetful


def numbers_its_micro_batches_anew(built: Training) -> None:
    """Every micro-batch draws the dropout mask of the first."""
    backward = built.runner.backward

    def alike(samples: Any, **options: Any) -> Any:
        for stage in built.runner._scheduled:
            stage.forward_one_chunk = _with_first_key(stage)
        return backward(samples, **options)

    built.runner.backward = alike


def _with_first_key(stage: Any) -> Any:
    forward = type(stage).forward_one_chunk

    def run(chunk: int, *args: Any, **kwargs: Any) -> Any:
        stage.arguments[chunk]["key"] = stage.arguments[0]["key"]
        return forward(stage, chunk, *args, **kwargs)

    return run


PP2 = Composition("llama-tied", ParallelConfig(pp=2), world_size=2)
ZBV = Composition("llama", ParallelConfig(pp=2, pp_schedule="zbv"), world_size=2)
MISTAKES: list[tuple[Mistake, Composition, str]] = [
    (forgets_the_tied_gradient, PP2, "gradient embedding.weight"),
    (leaves_out_the_micro_batch_scale, PP2, "gradient blocks.0.mlp.down.weight"),
    (norm_misses_a_stage, PP2, "norm 0"),
    (loses_what_was_postponed, ZBV, "gradient blocks.0.mlp.down.weight"),
    (numbers_its_micro_batches_anew, PP2, "loss 0"),
]


def train_with(mistake: str, case: Composition) -> Measured:
    """On a rank: three steps with the mistake of that name, or without."""
    with double():
        mesh = Mesh.of(case.parallel, "cpu")
        built = build(case.config(), mesh, VOCABULARY)
        assert isinstance(built.runner, Pipeline)
        assert isinstance(built.optimizer, Optimizer)
        for make, *_ in MISTAKES:
            if make.__name__ == mistake:
                make(built)
        return steps(case, mesh, built)[0]


@pytest.mark.parametrize(("mistake", "case", "seen"), MISTAKES, ids=lambda x: getattr(x, "__name__", ""))
def test_the_mistake_is_seen(mistake: Mistake, case: Composition, seen: str, ranks: Ranks) -> None:
    alone = train(case.alone())[0]
    for name in ("none", mistake.__name__):
        merged: Measured = {}
        for found in ranks(train_with, case.world_size, name, case):
            merged |= {key: x for key, x in found.items() if key not in merged}
        wrong = [text.split(" differs")[0] for text in mismatches(alone, merged, 1e-10)]
        assert wrong == [] if name == "none" else seen in wrong
