"""A number that is not finite: every rank says which parameter was first, and stops or skips as it was told."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import Ranks
from tests.proofs.compositions import VOCABULARY, Composition, batch
from tests.train import runs
from tpformer import Axis, Mesh, ParallelConfig
from tpformer.train import nonfinite
from tpformer.train import optimizer as optimizer_module
from tpformer.train.build import Training, build
from tpformer.train.schedule import OptimizerConfig
from tpformer.train.step import StepOptions, StepReport, train_step
from tpformer.train.trainer import Trainer

LAYOUTS = {
    "one process": ParallelConfig(),
    "tp 2": ParallelConfig(tp=2),
    "tp 2 sp": ParallelConfig(tp=2, sequence_parallel=True),
    "tp 4": ParallelConfig(tp=4),  # keys and values are copies
    "dp 2": ParallelConfig(dp=2),
    "pp 2": ParallelConfig(pp=2),
    "pp 2 x tp 2, zbv": ParallelConfig(pp=2, tp=2, pp_schedule="zbv"),
    "dp 2, fsdp": ParallelConfig(dp=2, dp_mode="fsdp"),
    "dp 2, zero2": ParallelConfig(dp=2, dp_mode="zero2"),
}


def laid_out(parallel: ParallelConfig, **options: Any) -> tuple[Training, Mesh]:
    """On a rank: what trains."""
    mesh = Mesh.of(parallel, "cpu")
    config = Composition("llama", parallel).config()
    config = replace(config, optimizer=OptimizerConfig(lr=0.01, **options))
    return build(config, mesh, VOCABULARY), mesh


def step(built: Training, mesh: Mesh, number: int) -> StepReport:
    """The step of that number."""
    samples = batch(number).chunk(mesh.dp.size)[mesh.dp.rank]
    return train_step(built.runner, built.gradients, built.optimizer, samples, StepOptions(2, 0.01))


def poison(built: Training, mesh: Mesh, where: dict[str, tuple[int, float]]) -> None:
    """From now on gradients of these names hold that number at their last element, on that rank."""
    finish = built.gradients.finish

    def finished() -> dict[str, torch.Tensor]:
        gradients = finish()
        for name, (rank, value) in where.items():
            if name in gradients and mesh.world.rank == rank:
                gradients[name].view(-1)[-1] = value
        return gradients

    built.gradients.finish = finished  # type: ignore[method-assign]


def stopped(parallel: ParallelConfig, where: dict[str, tuple[int, float]]) -> tuple[str, bool]:
    """On a rank: what the second step raises, and whether nothing has changed."""
    built, mesh = laid_out(parallel)
    step(built, mesh, 0)
    before = {name: x.clone() for name, x in built.optimizer.state().items()}
    poison(built, mesh, where)
    said = ""
    try:
        step(built, mesh, 1)
    except FloatingPointError as error:
        said = str(error)
    return said, same(before, built)


def same(before: dict[str, torch.Tensor], built: Training) -> bool:
    """Weights and moments, bit for bit."""
    after = built.optimizer.state()
    return before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())


def on_ranks(ranks: Ranks, fn: Any, parallel: ParallelConfig, *args: Any) -> list[Any]:
    """One process runs it here."""
    world_size = parallel.pp * parallel.tp * (parallel.dp or 1)
    return [fn(parallel, *args)] if world_size == 1 else ranks(fn, world_size, parallel, *args)


QKV, DOWN, NORM = "blocks.1.attention.qkv.weight", "blocks.0.mlp.down.weight", "norm.weight"


@pytest.mark.parametrize(
    ("layout", "where", "first"),
    [
        ("one process", {QKV: (0, math.nan), NORM: (0, math.inf)}, f"{QKV} (nan, on rank 0)"),
        ("tp 2", {NORM: (0, math.inf), DOWN: (1, math.inf)}, f"{DOWN} (inf, on rank 1)"),
        ("tp 2 sp", {"embedding.weight": (1, math.nan), DOWN: (0, math.inf)}, "embedding.weight (nan, on rank 1)"),
        ("tp 4", {QKV: (3, math.nan)}, f"{QKV} (nan, on rank 3)"),  # a copied key-value head: its last element
        ("dp 2", {QKV: (1, -math.inf)}, f"{QKV} (inf, on rank 1)"),
        ("pp 2", {NORM: (1, math.nan), "blocks.2.mlp.down.weight": (1, math.inf)}, "blocks.2.mlp.down.weight (inf"),
        ("pp 2", {DOWN: (0, math.nan), "blocks.2.mlp.down.weight": (1, math.inf)}, f"{DOWN} (nan, on rank 0)"),
        # of a V, the first rank has the first and the last blocks: 2 is before 3, and on another rank
        (
            "pp 2 x tp 2, zbv",
            {"blocks.3.mlp.down.weight": (0, math.nan), "blocks.2.mlp.down.weight": (3, math.nan)},
            "blocks.2.mlp.down.weight (nan, on rank 3)",
        ),
        ("dp 2, fsdp", {QKV: (1, math.nan), NORM: (0, math.nan)}, f"{QKV} (nan, on rank 1)"),
        ("dp 2, zero2", {DOWN: (0, math.inf)}, f"{DOWN} (inf, on rank 0)"),
    ],
    ids=str,
)
def test_every_rank_names_the_first(layout: str, where: dict[str, tuple[int, float]], first: str, ranks: Ranks) -> None:
    found = on_ranks(ranks, stopped, LAYOUTS[layout], where)
    assert len(set(found)) == 1
    said, unchanged = found[0]
    assert unchanged
    assert f"is not finite at step 2: the first parameter with such a gradient is {first}" in said
    assert said.endswith(", the loss is finite")


def bad_weight(parallel: ParallelConfig, rank: int, name: str, on: str = "stop") -> str:
    """On a rank: what a step says after a weight of one rank's became nan."""
    built, mesh = laid_out(parallel, on_nonfinite=on)
    if mesh.world.rank == rank:
        built.optimizer.masters[name].fill_(math.nan)
    try:
        return step(built, mesh, 0).problem
    except FloatingPointError as error:
        return str(error)


UP = "blocks.2.mlp.down.weight"


@pytest.mark.parametrize("on", ["stop", "skip"])
@pytest.mark.parametrize(
    ("layout", "rank", "name", "loss", "output"),
    [
        ("one process", 0, UP, "rank 0", "blocks.2 is the first, on rank 0"),
        ("dp 2", 1, UP, "rank 1", "blocks.2 is the first, on rank 1"),  # gradients are summed: only this tells the rank
        ("tp 2", 1, UP, "ranks 0 1", "blocks.2 is the first, on ranks 0 1"),
        ("tp 2 sp", 1, "norm.weight", "ranks 0 1", "norm is the first, on rank 1"),
        ("pp 2", 1, UP, "rank 1", "blocks.2 is the first, on rank 1"),
        ("pp 2 x tp 2, zbv", 2, UP, "ranks 0 1", "blocks.2 is the first, on ranks 2 3"),
        ("one process", 0, "embedding.weight", "rank 0", "embedding is the first, on rank 0"),
        ("dp 2, fsdp", 1, UP, "ranks 0 1", "blocks.2 is the first, on ranks 0 1"),
    ],
    ids=str,
)
def test_a_loss_that_is_not_finite_is_said_with_its_ranks_and_the_first_output(
    on: str, layout: str, rank: int, name: str, loss: str, output: str, ranks: Ranks
) -> None:
    (said,) = set(on_ranks(ranks, bad_weight, LAYOUTS[layout], rank, name, on))
    assert "or loss nan is not finite at step 1" in said
    assert said.endswith(f", the loss itself is not finite on {loss}; of all outputs that of {output}")


def test_finite_gradients_whose_norm_overflows_are_told_apart() -> None:
    built, mesh = laid_out(ParallelConfig())
    poison(built, mesh, {NORM: (0, 3e38), DOWN: (0, -3e38)})
    with pytest.raises(FloatingPointError, match="gradient is finite, their squares overflow, the loss is finite"):
        step(built, mesh, 0)


# skipping


def skipping(parallel: ParallelConfig, where: dict[str, tuple[int, float]]) -> list[Any]:
    """On a rank: a good step, a bad one, a good one; of the bad one, its report; and the final state beside that of a
    run to which the bad step never came."""
    built, mesh = laid_out(parallel, on_nonfinite="skip")
    step(built, mesh, 0)
    before = {name: x.clone() for name, x in built.optimizer.state().items()}
    finish = built.gradients.finish
    poison(built, mesh, where)
    report = step(built, mesh, 1)
    unchanged = same(before, built)
    built.gradients.finish = finish  # type: ignore[method-assign]
    step(built, mesh, 2)
    never, _ = laid_out(parallel)
    step(never, mesh, 0)
    step(never, mesh, 2)
    after = {name: x.clone() for name, x in never.optimizer.state().items()}
    return [report.skipped, report.problem, unchanged, same(after, built), not same(before, built)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_skipped_step_leaves_everything_bit_for_bit(layout: str, ranks: Ranks) -> None:
    parallel = LAYOUTS[layout]
    last = parallel.pp * parallel.tp * (parallel.dp or 1) - 1
    name = "blocks.2.mlp.down.weight" if parallel.pp_schedule == "zbv" else "blocks.3.mlp.down.weight"
    for skipped, problem, *rest in on_ranks(ranks, skipping, parallel, {name: (last, math.nan)}):
        assert skipped
        assert f"the first parameter with such a gradient is {name} (nan, on rank {last})" in problem
        assert rest == [True, True, True]


def each_for_itself(parallel: ParallelConfig) -> list[bool]:
    """The control: each rank sees its own norm only."""
    built, mesh = laid_out(parallel, on_nonfinite="skip")
    poison(built, mesh, {QKV: (1, math.nan)})
    built.optimizer.mesh = Mesh(world=Axis("world"))
    return [step(built, mesh, 0).skipped]


def test_a_decision_by_each_rank_alone_would_be_seen(ranks: Ranks) -> None:
    assert ranks(each_for_itself, 2, LAYOUTS["tp 2"]) == [[False], [True]]


def test_too_many_in_a_row_stop_it_and_a_good_one_starts_the_count_again() -> None:
    built, mesh = laid_out(ParallelConfig(), on_nonfinite="skip", max_skipped=2)
    finish = built.gradients.finish
    for bad in (True, True, False, True, True):
        built.gradients.finish = finish  # type: ignore[method-assign]
        if bad:
            poison(built, mesh, {NORM: (0, math.nan)})
        assert step(built, mesh, 0).skipped is bad
    assert (built.optimizer.skipped, built.optimizer.steps) == (4, 1)
    with pytest.raises(FloatingPointError, match=r"at step 6: .*; max_skipped \(2\) steps before it were skipped"):
        step(built, mesh, 0)


def test_good_steps_do_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it costs to find the first one is paid when there is one."""
    monkeypatch.setattr(optimizer_module, "first_not_finite", lambda *_: pytest.fail("it looked"))
    built, mesh = laid_out(ParallelConfig())
    step(built, mesh, 0)


def test_the_order_of_blocks_is_that_of_their_numbers() -> None:
    order = ["embedding.weight", "blocks.2.a", "blocks.10.a", "blocks.10.b", "norm.weight"]
    places = [nonfinite._place(name, order) for name in order]
    assert places == sorted(places)
    assert nonfinite._place("blocks.9.z", ["blocks.9.z"]) < places[2]


# in a run


class PoisonedTrainer(Trainer):
    """One gradient of the steps 3 and 5 is not finite."""

    bad = (3, 5)

    def _train_step(self) -> Any:
        finish = self.steps._built.gradients.finish
        if self.step + 1 in self.bad:
            poison(self.steps._built, self.mesh, {"norm.weight": (0, math.nan)})
        report = super()._train_step()
        self.steps._built.gradients.finish = finish  # type: ignore[method-assign]
        return report


def test_skipped_steps_are_counted_logged_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also by a run that is resumed between the two of them: the same records."""
    found = []
    for directory, stops in ((tmp_path / "whole", [6]), (tmp_path / "parts", [4, 6])):
        directory.mkdir()
        for number, steps in enumerate(stops):
            options = {"steps": steps, "resume": number > 0, "eval_interval": 0, "log_interval": 6, "sample_tokens": 0}
            config = runs.config(**options)  # type: ignore[arg-type]
            config = replace(config, optimizer=replace(config.optimizer, on_nonfinite="skip", schedule="constant"))
            PoisonedTrainer(config, Mesh(), runs.corpus(), directory).run()
        found.append({r["step"]: r.get("skipped_steps") for r in runs.records(directory) if "loss" in r})
    assert found == [{3: 1, 5: 2, 6: 2}, {3: 1, 4: 1, 5: 2, 6: 2}]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(said) == 4
    assert "is not finite at step 3: the first parameter with such a gradient is norm.weight" in said[0]
    assert "at step 5" in said[1]
    assert said[2:] == said[:2]
