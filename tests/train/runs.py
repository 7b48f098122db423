"""Whole runs of the trainer on a rank: tiny, on a text that is not all alike, and some of them interrupted."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.proofs.cases import Layout, gpt, llama
from tpformer import GPTConfig, LlamaConfig, Mesh
from tpformer.data import ByteTokenizer
from tpformer.parallel_config import ParallelConfig, Precision
from tpformer.train.config import DataConfig, RunConfig, TrainConfig
from tpformer.train.corpus import Corpus
from tpformer.train.schedule import OptimizerConfig
from tpformer.train.trainer import Trainer

VOCABULARY = 257
Record = dict[str, Any]


class Killed(Exception):
    """The end of a run that goes on later."""


class KilledTrainer(Trainer):
    """Stops after `last` steps of this process, whether that step was saved or not."""

    last = 0

    def _train_step(self) -> Any:
        if self.last == 0:
            raise Killed
        self.last -= 1
        return super()._train_step()


def corpus() -> Corpus:
    """3000 bytes to train on, and 400 held out."""
    tokens = np.random.default_rng(0).integers(97, 123, 3400).astype(np.uint16)
    tokens[1::2] = tokens[::2]  # every other one can be learned
    return Corpus(tokens[:3000], tokens[3000:], VOCABULARY, ByteTokenizer())


def config(model: str = "llama", precision: Precision = "fp32", **run: Any) -> TrainConfig[Any]:
    """Six steps, logged one by one, with dropout, micro-batches, and a rate that changes with each step."""
    sizes = {"vocab_size": VOCABULARY, "dropout": 0.1, "attention_dropout": 0.1, "max_seq_len": 16}
    config: LlamaConfig | GPTConfig = llama(**sizes, num_kv_heads=2) if model == "llama" else gpt(**sizes)
    options: dict[str, Any] = {
        "steps": 6,
        "batch_size": 8,
        "micro_batch_size": 2,
        "log_interval": 1,
        "sample_tokens": 3,
        "prompt": "ab",
        "eval_interval": 2,
        "eval_samples": 5,
        "checkpoint_interval": 3,
        "keep_checkpoints": 0,
        "device": "cpu",
    }
    return TrainConfig(
        model=config,
        family=model,  # type: ignore[arg-type]
        run=RunConfig(**(options | run)),
        data=DataConfig(seq_len=16),
        parallel=ParallelConfig(precision=precision),
        optimizer=OptimizerConfig(lr=0.01, warmup_steps=2),
    )


def run(config: TrainConfig[Any], layout: Layout, directory: Path, stop_after: int | None = None) -> list[list[int]]:
    """On a rank: train, to the end or until it is stopped; the numbers of the samples of each step."""
    parallel = replace(config.parallel, tp=layout.tp, dp=layout.dp, sequence_parallel=layout.sequence_parallel)
    return run_parallel(replace(config, parallel=parallel), directory, stop_after)


def run_parallel(config: TrainConfig[Any], directory: Path, stop_after: int | None = None) -> list[list[int]]:
    """The same, on the layout of the configuration."""
    directory.mkdir(exist_ok=True)
    trainer = KilledTrainer(config, Mesh.of(config.parallel, "cpu"), corpus(), directory)
    trainer.last = -1 if stop_after is None else stop_after
    seen: list[list[int]] = []
    samples = trainer.sampler.samples

    def watched(start: int, count: int) -> torch.Tensor:
        seen.append(list(range(start, start + count)))
        return samples(start, count)

    trainer.sampler.samples = watched  # type: ignore[method-assign]
    with contextlib.suppress(Killed):
        trainer.run()
    trainer.checkpoints.wait()  # the last one of a run that was killed may still be written
    return seen


def complaint(config: TrainConfig[Any], layout: Layout, directory: Path) -> str:
    """On a rank: what building a trainer raises."""
    try:
        Trainer(config, layout.mesh(), corpus(), directory)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def resumed(config: TrainConfig[Any], **run: Any) -> TrainConfig[Any]:
    """The same with --resume."""
    return replace(config, run=replace(config.run, resume=True, **run))


def records(directory: Path) -> list[Record]:
    """metrics.jsonl, without how fast it was."""
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    rates = ("tokens_per_second", "checkpoint_step", "checkpoint_stall_seconds", "checkpoint_seconds")
    found = [{key: value for key, value in record.items() if key not in rates} for record in found]
    return [record for record in found if record.keys() != {"step"}]
