"""fp16: the loss scale grows and falls, a step that overflows anywhere is skipped everywhere, and training works."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

import tpformer
from tests.distributed import Ranks
from tests.proofs.cases import Layout, build, build_random, gpt, llama, mismatches
from tests.train.runs import config, corpus, records
from tests.train.test_optimizer import Parts, some_gradients
from tpformer import Mesh
from tpformer.parallel.data import GradientBuckets
from tpformer.parallel_config import ParallelConfig
from tpformer.train import gradient_norm
from tpformer.train.optimizer import Optimizer
from tpformer.train.precision import LossScaler
from tpformer.train.schedule import OptimizerConfig
from tpformer.train.step import StepOptions, train_step
from tpformer.train.trainer import Trainer

FP16 = torch.float16
CONFIG = OptimizerConfig(lr=0.01, eps=1e-3)
NO_LOSS = torch.zeros(())


# the scale


def test_it_grows_after_good_steps_and_falls_at_once() -> None:
    """By hand: doubled after three good steps in a row, halved by a bad one, which also starts the count again."""
    scaler = LossScaler(scale=8.0, growth_interval=3)
    steps = [(True, 8), (True, 8), (True, 16), (True, 16), (True, 16), (False, 8), (True, 8), (True, 8), (False, 4)]
    steps += [(True, 4), (True, 4), (True, 8), (False, 4), (False, 2), (True, 2), (True, 2), (True, 4), (True, 4)]
    for finite, expected in steps:
        scaler.update(finite)
        assert scaler.scale == expected
    assert scaler.skipped == 4
    assert scaler.state() == {"scale": 4.0, "good_steps": 1, "skipped": 4}
    other = LossScaler(growth_interval=3)
    other.load_state(json.loads(json.dumps(scaler.state())))
    assert other == scaler


def test_by_default_it_is_that_of_everybody() -> None:
    scaler = LossScaler()
    assert scaler.scale == 65536
    for step in range(1000):
        assert (step, scaler.scale) == (step, 65536)
        scaler.update(True)
    assert scaler.scale == 2 * 65536


def test_at_its_minimum_it_gives_up() -> None:
    scaler = LossScaler(scale=1.5)
    scaler.update(False)
    assert scaler.scale == 1.0
    with pytest.raises(FloatingPointError, match="not finite although the loss scale is at its minimum"):
        scaler.update(False)


def test_only_fp16_has_one() -> None:
    for dtype in (None, torch.float64, torch.bfloat16):
        optimizer = Optimizer(Parts(), Mesh(), CONFIG, dtype)
        assert (optimizer.scaler, optimizer.loss_scale) == (None, 1.0)
    assert Optimizer(Parts(), Mesh(), CONFIG, FP16).loss_scale == 65536


# clipping


def clipped(dtype: torch.dtype | None, wrong: bool = False) -> dict[str, Tensor]:
    """The weights after six steps whose gradients are above the limit and below it in turn."""
    model = Parts().float()
    optimizer = Optimizer(model, Mesh(), CONFIG, dtype)
    for step in range(6):
        gradients = some_gradients(Parts().float(), step, scale=(5.0, 0.05)[step % 2])
        scale = optimizer.loss_scale
        gradients = {name: gradient * scale for name, gradient in gradients.items()}
        if wrong:  # clipped first
            norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
            gradients = {name: gradient * (1 / norm) * scale for name, gradient in gradients.items()}
        found = optimizer.step(gradients, 0.01, NO_LOSS).norm
        assert wrong or found == pytest.approx(plain_norm(step), rel=1e-6)
    return optimizer.masters


def plain_norm(step: int) -> float:
    """Of the gradients of that step, not scaled."""
    gradients = some_gradients(Parts().float(), step, scale=(5.0, 0.05)[step % 2])
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()


def test_clipping_sees_the_unscaled_gradients() -> None:
    """Masters of an unscaled fp32 run to 1e-6; if the scaled gradients were clipped, they would end elsewhere."""
    expected, found, wrong = clipped(None), clipped(FP16), clipped(FP16, wrong=True)
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, rtol=1e-6, atol=0), name
        assert not torch.allclose(wrong[name], weight, rtol=1e-4, atol=0), name


# overflow

Reports = list[tuple[float, bool, bool, int]]
"""Of each step: the scale, whether it was skipped, whether its numbers were finite, and Adam's steps so far."""


def overflow(layout: Layout, rank: int, where: str, local: bool = False) -> tuple[Reports, dict[str, np.ndarray] | str]:
    """On a rank: four steps; in the second one, one rank has a number that is not finite. What each step reported, and
    the weights, or how their copies differ.

    where: "sent" (a gradient, before replicas are summed), "kept" (that, afterwards), "copy" (of a weight that every
    rank has), "loss", or "no step": it is only counted as skipped. local: the decision is each rank's own.
    """
    mesh = layout.mesh()
    model = build_random(llama(num_kv_heads=2), mesh, torch.float32)
    optimizer = Optimizer(model, mesh, replace(CONFIG, clip_norm=0), FP16)
    optimizer.scaler = LossScaler(scale=256.0)
    buckets, reports = GradientBuckets(model, mesh), []
    for step in range(4):
        if step == 1 and where == "no step":
            optimizer.scaler.update(False)
            continue
        ours = step == 1 and mesh.world.rank == rank
        samples = torch.randint(101, (4, 9), generator=torch.Generator().manual_seed(step))
        with poisoned(model, buckets, where if ours else "", local), tpformer.trace_communication() as trace:
            report = train_step(
                model,
                buckets,
                optimizer,
                samples.chunk(mesh.dp.size)[mesh.dp.rank],
                StepOptions(micro_batch_size=1, lr=0.01),
            )
        assert local or [c.bytes for c in trace.calls if c.site.startswith("train/gradient_norm.py:")] == [24], (
            "norm and loss"
        )
        finite = math.isfinite(report.loss + report.grad_norm)
        reports.append((report.loss_scale, report.skipped, finite, optimizer.steps))
    try:
        weights = {name: tpformer.full_parameter(model, name).float().numpy() for name, _ in model.named_parameters()}
    except RuntimeError as error:
        return reports, str(error)
    return reports, weights


@contextmanager
def poisoned(model: Any, buckets: GradientBuckets, where: str, local: bool) -> Iterator[None]:
    """One number of this rank's is not finite, and the ranks do not tell each other, if that is asked for."""
    finish, loss = buckets.finish, type(model).loss

    def finished() -> dict[str, Tensor]:
        gradients = finish()
        gradients["norm.weight" if where == "copy" else WEIGHT].view(-1)[3] = math.inf
        return gradients

    with ExitStack() as stack:
        if local:
            stack.enter_context(patch.object(gradient_norm, "all_reduce_", lambda x, axis: x))
        if where == "loss":
            stack.enter_context(patch.object(type(model), "loss", lambda *a, **k: loss(*a, **k) * math.nan))
        if where == "sent":
            handle = model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
            stack.callback(handle.remove)
        if where in ("kept", "copy"):
            stack.enter_context(patch.object(buckets, "finish", finished))
        yield


def with_and_without(layout: Layout, rank: int, where: str) -> tuple[Any, Any]:
    """On a rank: the run, and the one without the step."""
    return overflow(layout, rank, where), overflow(layout, rank, "no step")


WEIGHT = "blocks.1.mlp.down.weight"


def agree(found: list[tuple[Reports, dict[str, np.ndarray] | str]]) -> bool:
    """Whether every rank did the same and has the same weights."""
    (reports, weights), *others = found
    if any(isinstance(other, str) for _, other in found):
        return False
    assert isinstance(weights, dict)
    same = [r == reports and all(np.array_equal(weights[name], w[name]) for name in weights) for r, w in others]  # type: ignore[index]
    return all(same)


@pytest.mark.parametrize(
    ("layout", "rank", "where"),
    [
        (Layout(2), 1, "kept"),
        (Layout(2), 1, "copy"),
        (Layout(1, 2), 1, "sent"),
        (Layout(1, 2), 1, "kept"),
        (Layout(1, 2), 0, "loss"),
        (Layout(2, 2, True), 3, "copy"),
    ],
    ids=str,
)
def test_one_rank_s_overflow_is_skipped_by_all(layout: Layout, rank: int, where: str, ranks: Ranks) -> None:
    """The run is that without this step, bit for bit, but for the scale, which is halved after it."""
    runs = ranks(with_and_without, layout.world_size, layout, rank, where)
    found = [run for run, _ in runs]
    assert agree(found)
    reports, weights = found[0]
    assert reports == [(256, False, True, 1), (256, True, False, 1), (128, False, True, 2), (128, False, True, 3)]
    expected, without = runs[0][1]
    assert expected == [reports[0], *reports[2:]]
    assert isinstance(without, dict)
    assert isinstance(weights, dict)
    assert all(np.array_equal(weights[name], without[name]) for name in without)


@pytest.mark.parametrize("layout", [Layout(2), Layout(1, 2)], ids=str)
def test_a_decision_by_each_rank_for_itself_would_be_seen(layout: Layout, ranks: Ranks) -> None:
    """The control: one rank skips, the other does not, and what must agree does not."""
    found = ranks(overflow, 2, layout, 1, "kept", True)
    assert [[skipped for _, skipped, _, _ in reports] for reports, _ in found][1] == [False, True, False, False]
    assert not agree(found)


def hopeless(layout: Layout) -> str:
    """On a rank: what a step raises whose loss is not finite on one rank, where the scale cannot fall."""
    mesh = layout.mesh()
    model = build(llama(), mesh)
    optimizer = Optimizer(model, mesh, CONFIG, FP16)
    optimizer.scaler = LossScaler(scale=1.0)
    try:
        optimizer.step(some_gradients(model, 0), 0.1, torch.tensor(math.inf if mesh.world.rank else 1.0))
    except FloatingPointError as error:
        return str(error)
    return ""


def test_every_rank_hears_that_the_scale_cannot_fall(ranks: Ranks) -> None:
    errors = ranks(hopeless, 2, Layout(2))
    assert errors[0] == errors[1]
    assert "minimum (1.0)" in errors[0]


# training


def test_small_gradients_survive_because_of_the_scale() -> None:
    """Of samples that the model is sure of: unscaled, most of what fp16 can still hold is rounded or gone."""
    errors = {}
    samples = torch.arange(9).repeat(4, 1)
    for scale in (None, 1.0, 2.0**16):
        model = build(llama(), Mesh())
        optimizer = Optimizer(model, Mesh(), replace(CONFIG, clip_norm=0), None if scale is None else FP16)
        if optimizer.scaler is not None:
            assert scale is not None
            optimizer.scaler.scale = scale
        buckets = GradientBuckets(model, Mesh())
        with patch.object(type(model), "loss", lambda *a, _loss=type(model).loss, **k: _loss(*a, **k) * 1e-6):
            train_step(model, buckets, optimizer, samples, StepOptions(micro_batch_size=4, lr=0.0))
        averages = (tensor for name, tensor in optimizer.state().items() if name.startswith("exp_avg/"))
        errors[scale] = torch.cat([tensor.flatten() for tensor in averages])
    exact = errors[None]
    lost = {scale: ((errors[scale] - exact).norm() / exact.norm()).item() for scale in (1.0, 2.0**16)}
    assert lost[2.0**16] < 0.01 < 0.1 < lost[1.0], lost


def test_gradients_of_micro_batches_are_summed_in_fp32() -> None:
    """Bit for bit the fp32 sum of what autograd gives in fp16; an fp16 sum is another."""
    model, twin = build(gpt(), Mesh()).half(), build(gpt(), Mesh()).half()
    buckets = GradientBuckets(model, Mesh())
    expected = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    rounded = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    parts = torch.randint(101, (6, 2, 9), generator=torch.Generator().manual_seed(0))
    for number, part in enumerate(parts):
        loss = 64 * twin.loss(part[:, :-1], part[:, 1:])
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        for name, gradient in zip(expected, gradients, strict=True):
            expected[name] += gradient.float()
            rounded[name] += gradient
        buckets.start(last=number == len(parts) - 1)
        (model.loss(part[:, :-1], part[:, 1:]) * 64).backward()
    found = buckets.finish()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected[name]), name
    assert any(not torch.equal(rounded[name].float(), expected[name]) for name in expected)


def curve(mesh: Mesh, dtype: torch.dtype | None) -> tuple[list[float], dict[str, np.ndarray]]:
    """The losses of twenty steps on counting by sevens, and the masters after three steps, whole.

    eps is so large that a gradient which is nothing but rounding does not move its weight by lr.
    """
    model = build(llama(num_kv_heads=2), mesh)
    optimizer = Optimizer(model, mesh, replace(CONFIG, eps=0.01), dtype)
    buckets = GradientBuckets(model, mesh)
    generator, losses, early = torch.Generator().manual_seed(0), [], {}
    for step in range(20):
        start = torch.randint(101, (8, 1), generator=generator)
        samples = ((start + 7 * torch.arange(13)) % 101).chunk(mesh.dp.size)[mesh.dp.rank]
        report = train_step(model, buckets, optimizer, samples, StepOptions(micro_batch_size=2, lr=0.01))
        assert not report.skipped
        losses.append(report.loss)
        if step == 2:
            early = masters(optimizer, mesh)
    return losses, early


def masters(optimizer: Optimizer, mesh: Mesh) -> dict[str, np.ndarray]:
    """The fp32 weights, whole."""
    model = build(llama(num_kv_heads=2), mesh)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(optimizer.masters[name])
    return {name: tpformer.full_parameter(model, name).numpy() for name in optimizer.masters}


def curve_on(layout: Layout) -> tuple[list[float], dict[str, np.ndarray]]:
    """On a rank: fp16."""
    return curve(layout.mesh(), FP16)


@lru_cache
def alone(dtype: torch.dtype | None) -> tuple[list[float], dict[str, np.ndarray]]:
    """One process."""
    return curve(Mesh(), dtype)


def test_fp16_training_follows_fp32() -> None:
    losses, weights = alone(FP16)
    assert losses[0] == pytest.approx(4.6, abs=0.1)
    assert losses[-1] < 0.6 * losses[0]
    assert max(abs(a - b) for a, b in zip(losses, alone(None)[0], strict=True)) < 0.002
    assert losses != alone(None)[0], "it is fp16 that was run"
    assert mismatches(alone(None)[1], weights, 2**-10) == []
    assert mismatches(alone(None)[1], alone(torch.bfloat16)[1], 2**-10) != [], "bf16 would be seen"


@pytest.mark.parametrize("layout", [Layout(2), Layout(2, 2, True)], ids=str)
def test_fp16_training_is_the_same_at_any_layout(layout: Layout, ranks: Ranks) -> None:
    """Masters after three steps to fp16's rounding, and losses."""
    losses, weights = alone(FP16)
    for found, ours in ranks(curve_on, layout.world_size, layout):
        assert max(abs(a - b) for a, b in zip(losses, found, strict=True)) < 0.001
        assert mismatches(weights, ours, 2**-10) == []


# the trainer


def trainer(directory: Path, **run: Any) -> Trainer:
    """Six fp16 steps that begin with a scale too large, and double it every second step."""
    settings = replace(config(sample_tokens=0, **run), parallel=ParallelConfig(precision="fp16"))
    directory.mkdir(exist_ok=True)
    found = Trainer(settings, Mesh(), corpus(), directory)
    assert found.optimizer.scaler is not None
    found.optimizer.scaler.growth_interval = 2
    if not run.get("resume"):
        found.optimizer.scaler.scale = 2.0**21
    return found


def steps_of(trainer: Trainer, last: int) -> None:
    """Train up to that step, and save."""
    for _ in range(last - trainer.step):
        report = trainer._train_step()
        trainer._log(**trainer._numbers(report))
    trainer.save()
    trainer.checkpoints.wait()


def test_a_resumed_run_keeps_its_scale(tmp_path: Path) -> None:
    """Every record and weight bit for bit that of the run that did not stop; with a new scale they would differ."""
    straight, first = trainer(tmp_path / "straight"), trainer(tmp_path / "stopped")
    steps_of(straight, 8)
    steps_of(first, 3)
    shutil.copytree(tmp_path / "stopped", tmp_path / "forgotten")
    expected = records(tmp_path / "straight")
    skipped = expected[-1]["skipped_steps"]
    assert 0 < expected[2]["skipped_steps"] < skipped
    assert straight.optimizer.scaler != first.optimizer.scaler != LossScaler(growth_interval=2)
    assert first.optimizer.scaler is not None
    assert first.optimizer.scaler.good_steps == 1, "which is half of what growth takes"
    assert expected[0].keys() == {"step", "loss", "loss_scale", "skipped_steps"}, "the norm is infinite"
    assert expected[2].keys() == expected[0].keys() | {"grad_norm"}
    assert len({record["loss_scale"] for record in expected}) > 2

    second = trainer(tmp_path / "stopped", resume=True)
    assert second.optimizer.steps == 3 - expected[2]["skipped_steps"]
    steps_of(second, 8)
    assert records(tmp_path / "stopped") == expected
    assert second.optimizer.steps == straight.optimizer.steps == 8 - skipped
    assert second.optimizer.scaler == straight.optimizer.scaler
    for name, tensor in straight.optimizer.state().items():
        assert torch.equal(second.optimizer.state()[name], tensor), name

    control = trainer(tmp_path / "forgotten", resume=True)
    control.optimizer.scaler = LossScaler(scale=2.0**21, growth_interval=2)
    steps_of(control, 8)
    assert records(tmp_path / "forgotten") != expected


def test_other_runs_say_nothing_of_a_scale(tmp_path: Path) -> None:
    settings = replace(config(sample_tokens=0, steps=1), parallel=ParallelConfig(precision="bf16"))
    Trainer(settings, Mesh(), corpus(), tmp_path).run()
    assert records(tmp_path)[0].keys() == {"step", "loss", "grad_norm"}
