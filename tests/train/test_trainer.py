"""The trainer does what its configuration says: which samples, rate and masks; when it logs, evaluates and saves."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import Ranks
from tests.proofs.cases import Layout, build
from tests.train.runs import VOCABULARY, Record, config, corpus, records
from tpformer import Key, Mesh
from tpformer.data import TokenSampler, unigram_entropy
from tpformer.parallel.data import GradientBuckets
from tpformer.parallel_config import ParallelConfig
from tpformer.train.build import build as build_training
from tpformer.train.config import TrainConfig
from tpformer.train.optimizer import Optimizer
from tpformer.train.schedule import learning_rate
from tpformer.train.step import StepOptions, train_step
from tpformer.train.trainer import Trainer, TrainReport


def train(settings: TrainConfig[Any], layout: Layout, directory: Path) -> tuple[TrainReport, int]:
    """On a rank: the report of a run, without its trace, and how many collectives that had."""
    mesh = layout.mesh() if layout.world_size > 1 else Mesh()
    directory.mkdir(exist_ok=True)
    settings = replace(settings, parallel=ParallelConfig(layout.tp, 1, layout.dp, layout.sequence_parallel))
    report = Trainer(settings, mesh, corpus(), directory).run()
    assert report.trace is not None
    return replace(report, trace=None, memory=""), len(report.trace.calls)


def by_hand(settings: TrainConfig[Any]) -> tuple[list[Record], torch.nn.Module]:
    """The losses and norms of a run, in a few lines of one's own, and the model; one process."""
    model = build(settings.model)
    optimizer, buckets = Optimizer(model, Mesh(), settings.optimizer), GradientBuckets(model, Mesh())
    sampler = TokenSampler(corpus().train, 16, settings.run.seed, VOCABULARY)
    found = []
    for step in range(6):
        report = train_step(
            model,
            buckets,
            optimizer,
            sampler.samples(8 * step, 8),
            StepOptions(
                micro_batch_size=settings.run.micro_batch_size or 8,
                lr=learning_rate(step, 6, settings.optimizer),
                key=Key(settings.run.seed).fold("dropout", step),
                z_loss=settings.run.z_loss,
            ),
        )
        found.append({"step": step + 1, "loss": report.loss, "grad_norm": report.grad_norm})
    return found, model


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 0, "z_loss": 0.01}], ids=str)
def test_a_run_is_the_steps_written_by_hand(options: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, and so is the held-out loss, which is the mean over samples without dropout."""
    settings = config(**options)
    report, collectives = train(settings, Layout(1), tmp_path)
    expected, model = by_hand(settings)
    assert [record for record in records(tmp_path) if "loss" in record] == expected
    assert collectives == 0
    held_out = TokenSampler(corpus().validation, 16, 0, VOCABULARY, shuffle=False).samples(0, 5)
    with torch.no_grad():
        each = [model.loss(x[None, :-1], x[None, 1:]).item() for x in held_out]  # type: ignore[operator]
    assert report.validation_loss == pytest.approx(sum(each) / 5, rel=1e-6)


@pytest.mark.parametrize("layout", [Layout(2), Layout(1, 2), Layout(2, 2, True)], ids=str)
def test_every_rank_reports_the_same(layout: Layout, tmp_path: Path, ranks: Ranks) -> None:
    """Five held-out samples are three for one replica and two for the other: the mean is over samples all the same."""
    expected, _ = train(config(), Layout(1), tmp_path / "alone")
    for report, collectives in ranks(train, layout.world_size, config(), layout, tmp_path / "ranks"):
        assert report.steps == 6
        assert report.validation_loss == pytest.approx(expected.validation_loss, rel=1e-6)
        assert report.uniform == math.log(257)
        assert report.unigram == unigram_entropy(corpus().validation)
        assert report.sample == expected.sample
        assert len(report.sample.encode()) >= 3
        assert collectives > 0


@pytest.mark.parametrize(
    ("options", "logged", "evaluated", "saved"),
    [
        ({"log_interval": 4, "eval_interval": 0, "checkpoint_interval": 0}, [4, 6], [6], [6]),
        ({"log_interval": 1, "eval_interval": 3, "checkpoint_interval": 4}, [1, 2, 3, 4, 5, 6], [3, 6], [4, 6]),
        ({"log_interval": 9, "eval_interval": 9, "checkpoint_interval": 9}, [6], [6], [6]),
    ],
    ids=str,
)
def test_intervals_are_kept_and_the_last_step_is_always_there(
    options: dict[str, Any], logged: list[int], evaluated: list[int], saved: list[int], tmp_path: Path
) -> None:
    train(config(sample_tokens=0, **options), Layout(1), tmp_path)
    found = records(tmp_path)
    assert [record["step"] for record in found if "loss" in record] == logged
    assert [record["step"] for record in found if "validation_loss" in record] == evaluated
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step_{i:08d}" for i in saved]


@pytest.mark.parametrize("prompt", ["ab", "a" * 15, "b" * 40])
def test_the_sample_takes_what_the_model_leaves(prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 tokens at a time; of a longer prompt the model sees the end, and one token follows."""
    trainer = Trainer(config(sample_tokens=100, prompt=prompt), Mesh(), corpus(), tmp_path)
    monkeypatch.setattr(trainer.corpus.tokenizer, "decode", list)
    shown: Any = trainer._sample()
    assert bytes(shown[: len(prompt)]).decode() == prompt
    assert len(shown) == max(16, len(prompt) + 1)


def test_more_held_out_samples_than_there_are_is_all_of_them(tmp_path: Path) -> None:
    settings = config(sample_tokens=0, steps=1, eval_samples=10**6)
    trainer = Trainer(settings, Mesh(), corpus(), tmp_path)
    assert trainer.held_out.num_samples == 24  # of 400 tokens
    everything = trainer.evaluate()
    tokens = trainer.held_out.samples(0, 24)
    with torch.no_grad():
        assert everything == pytest.approx(trainer.model.loss(tokens[:, :-1], tokens[:, 1:]).item(), rel=1e-6)


def test_a_seed_is_of_the_weights_the_data_and_dropout(tmp_path: Path) -> None:
    """Another seed is another run; the same seed is the same run."""
    found = []
    for number, seed in enumerate((0, 0, 1)):
        train(config(seed=seed, steps=2, sample_tokens=0), Layout(1), tmp_path / str(number))
        found.append(records(tmp_path / str(number)))
    assert found[0] == found[1]
    assert all(a != b for a, b in zip(found[0], found[2], strict=True))


def test_sizes_that_are_zero_are_the_data_s() -> None:
    settings = config()
    model = build_training(replace(settings, model=replace(settings.model, max_seq_len=0)), Mesh(), 300).model
    assert (model.config.vocab_size, model.config.max_seq_len) == (300, 16)
    assert build_training(settings, Mesh(), 257).model.config.max_seq_len == 16
