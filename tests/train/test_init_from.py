"""--init-from: a run begins with the weights of a Hugging Face directory, at any layout, and goes on like any other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tpformer
from tests.checkpoint.directories import save_case
from tests.distributed import Ranks
from tests.train import runs
from tpformer import Mesh, ParallelConfig
from tpformer.__main__ import main
from tpformer.checkpoint.huggingface import read_config
from tpformer.data import ByteTokenizer
from tpformer.placement import gather_full
from tpformer.train.config import TrainConfig
from tpformer.train.flags import parse_config
from tpformer.train.trainer import Trainer

CASE = "qwen3-kv1-257"  # with the vocabulary of the runs' bytes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_case(CASE, tmp_path_factory.mktemp("source") / "model")


def configured(source: Path, layout: ParallelConfig = ParallelConfig(), **run: Any) -> TrainConfig[Any]:
    config = runs.config(init_from=str(source), micro_batch_size=1, **run)
    return replace(config, model=read_config(source)[1], parallel=layout)


def first_weights(source: Path, directory: Path, layout: ParallelConfig) -> tuple[dict[str, Any], float]:
    """On a rank: a run's fp32 weights before its first step, gathered over tp and shards, and its held-out loss."""
    mesh = Mesh.of(layout, "cpu")
    trainer = Trainer(configured(source, layout), mesh, runs.corpus(), directory)
    optimizer = trainer.optimizer
    whole = {
        name: gather_full(master, optimizer.placements[name], mesh.tp, mesh.dp_shard).numpy()
        for name, master in optimizer.masters.items()
    }
    return whole, trainer.evaluate()


LAYOUTS = [
    ParallelConfig(),
    ParallelConfig(precision="bf16"),
    ParallelConfig(precision="bf16", offload_optimizer=True),
    ParallelConfig(tp=4),
    ParallelConfig(tp=2, pp=2),
    ParallelConfig(tp=2, dp=2, dp_mode="fsdp"),
]


@pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda c: f"tp{c.tp}pp{c.pp}{c.dp_mode}{c.precision}{c.offload_optimizer}"
)
def test_every_layout_begins_with_the_directory_s_weights(
    layout: ParallelConfig, source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    model = tpformer.load_pretrained(source)
    processes = layout.tp * layout.pp * (layout.dp or 1)
    results = ranks(first_weights, processes, source, tmp_path, layout)
    seen = set()
    for weights, loss in results:
        for name, found in weights.items():
            assert np.array_equal(found, tpformer.full_parameter(model, name).detach().numpy())
        seen |= weights.keys()
        assert abs(loss - expected_loss(source)) < (1e-5 if layout.precision == "fp32" else 0.05) * loss
    assert seen == {name for name, _ in model.named_parameters()}


def expected_loss(source: Path) -> float:
    """transformers' own, of the held-out samples that an evaluation takes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    held_out = torch.from_numpy(runs.corpus().validation[: 5 * 16 + 1].astype(np.int64))
    tokens, targets = held_out[:-1].view(5, 16), held_out[1:].view(5, 16)
    with torch.no_grad():
        return float(model(tokens, labels=targets, shift_labels=targets).loss)


def test_flags_take_the_model_from_the_directory(source: Path) -> None:
    config = parse_config(["--init-from", str(source), "--steps", "3", "--attention-dropout", "0.5"])
    assert config.family == "llama"
    assert config.model == replace(read_config(source)[1], attention_dropout=0.5)
    with pytest.raises(ValueError, match=r"family \(gpt\) must be llama"):
        parse_config(["--init-from", str(source), "--family", "gpt"])
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        parse_config(["--init-from", str(source / "nowhere")])


def test_flags_take_the_tokenizer_from_the_directory(source: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    asked = ["--init-from", str(tmp_path)]
    assert parse_config(asked).data.tokenizer == "byte", "there is none"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert parse_config(asked).data.tokenizer == str(tmp_path / "tokenizer.json")
    assert parse_config([*asked, "--tokenizer", "byte"]).data.tokenizer == "byte"


def test_the_sample_of_a_model_with_more_ids_than_its_tokenizer(tmp_path: Path) -> None:
    """An untrained model draws ids from all of its vocabulary; those without a text are left out."""
    config = runs.config(steps=1, sample_tokens=8, prompt="f")
    config = replace(config, model=replace(config.model, vocab_size=4096, max_seq_len=32))
    corpus = replace(runs.corpus(), vocab_size=4096, tokenizer=ByteTokenizer())
    report = Trainer(config, Mesh(), corpus, tmp_path).run()
    assert report.sample.startswith("f")


def test_a_damaged_checkpoint_is_refused_before_its_weights_are_used(source: Path, tmp_path: Path) -> None:
    """A flipped bit, which no header shows; from a directory without checksums nobody can tell."""
    assert main(["checkpoint", "convert", str(source), str(tmp_path)]) == 0
    step = tmp_path / "step_00000000"
    Trainer(configured(step), Mesh(), runs.corpus(), tmp_path / "run")
    content = bytearray((step / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (step / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: the checksum of"):
        Trainer(configured(step), Mesh(), runs.corpus(), tmp_path / "run")
    (step / "meta.json").unlink()
    Trainer(configured(step), Mesh(), runs.corpus(), tmp_path / "run")


def test_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    config = configured(source)
    other = replace(config, model=replace(config.model, num_layers=1, norm_eps=0.5))
    with pytest.raises(ValueError, match=r"num_layers 2, not 1") as caught:
        Trainer(other, Mesh(), runs.corpus(), tmp_path)
    assert "norm_eps" in str(caught.value)


def test_a_shorter_table_of_positions_is_refused(tmp_path: Path) -> None:
    source = save_case("untied-gelu-257", tmp_path / "model")
    config = runs.config("gpt", init_from=str(source))
    longer = replace(config, model=replace(read_config(source)[1], max_seq_len=16))
    with pytest.raises(ValueError, match=r"wpe\.weight has shape \(12, 32\), expected \(16, 32\)"):
        Trainer(longer, Mesh(), runs.corpus(), tmp_path)


def losses(directory: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_it_goes_on_and_a_converted_directory_is_the_same_run(source: Path, tmp_path: Path) -> None:
    """Three ways to six steps: at once, interrupted, and from `tpformer checkpoint convert` with --resume."""
    for name in ("whole", "halves", "converted"):
        (tmp_path / name).mkdir()
    config = configured(source)
    Trainer(config, Mesh(), runs.corpus(), tmp_path / "whole").run()
    runs.run_parallel(config, tmp_path / "halves", 4)
    resumed = replace(config, run=replace(config.run, resume=True))
    Trainer(resumed, Mesh(), runs.corpus(), tmp_path / "halves").run()
    assert main(["checkpoint", "convert", str(source), str(tmp_path / "converted" / "checkpoints")]) == 0
    Trainer(resumed, Mesh(), runs.corpus(), tmp_path / "converted").run()
    assert [step for step, _ in losses(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves") == losses(tmp_path / "converted")


def test_without_it_the_weights_are_the_seed_s(source: Path, tmp_path: Path) -> None:
    """Negative control of all the above."""
    config = configured(source)
    plain = Trainer(replace(config, run=replace(config.run, init_from="")), Mesh(), runs.corpus(), tmp_path)
    assert abs(plain.evaluate() - expected_loss(source)) > 0.1
