"""What is opened is written again bit for bit, from every layout the same bytes, and transformers opens it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

import tpformer
from tests.checkpoint.directories import GPT2, save_case
from tests.distributed import Ranks
from tests.models import test_transformers_llama
from tests.proofs.cases import random_batch
from tpformer import Mesh, ParallelConfig
from tpformer.checkpoint.families import llama
from tpformer.checkpoint.huggingface import Pretrained, load_weights
from tpformer.checkpoint.reading import SINGLE
from tpformer.train.build import build
from tpformer.train.config import DataConfig, RunConfig, TrainConfig

CASES = (*GPT2, *test_transformers_llama.CASES)


def write_at(source: Path, target: Path, degrees: tuple[int, ...], **options: Any) -> None:
    """On a rank: open a directory at each tp (the rest of the processes: replicas) and write it to target/tp."""
    for tp in degrees:
        mesh = Mesh.create(tp=tp, device="cpu")
        tpformer.save_pretrained(tpformer.load_pretrained(source, mesh=mesh), target / str(tp), **options)


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_bit_for_bit(case: str, ranks: Ranks, tmp_path: Path) -> None:
    save_case(case, tmp_path / "source")
    theirs = load_file(tmp_path / "source" / SINGLE)
    write_at(tmp_path / "source", tmp_path, (1,))
    ranks(write_at, 4, tmp_path / "source", tmp_path, (2, 4))
    for tp in (1, 2, 4):
        ours = load_file(tmp_path / str(tp) / SINGLE)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], x) for name, x in theirs.items())
        assert same_bytes(tmp_path / "1", tmp_path / str(tp))
    open_ = transformers.AutoModelForCausalLM.from_pretrained
    first, second = open_(tmp_path / "source"), open_(tmp_path / "2")
    assert type(first) is type(second) or case == "mistral-no-window"  # which a Llama is, too
    tokens, _ = random_batch(first.config.vocab_size)
    with torch.no_grad():
        assert torch.equal(first(tokens).logits, second(tokens).logits)


def same_bytes(one: Path, two: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def write_laid_out(source: Path, target: Path, layout: ParallelConfig) -> None:
    """On a rank: lay the model of a directory out for training, fill it, and write it."""
    opened, mesh = Pretrained.open(source), Mesh.of(layout, "cpu")
    config: TrainConfig[Any] = TrainConfig(
        model=opened.config,
        run=RunConfig(batch_size=12, micro_batch_size=1),
        parallel=layout,
        data=DataConfig(seq_len=8),
    )
    model = build(config, mesh, opened.config.vocab_size).model
    load_weights(model, opened, mesh)
    tpformer.save_pretrained(model, target)


LAYOUTS = [
    ParallelConfig(pp=2),
    ParallelConfig(tp=2, pp=2, sequence_parallel=True),
    ParallelConfig(tp=2, dp=2, dp_mode="fsdp"),
    ParallelConfig(dp=4, dp_mode="hsdp", dp_shard=2),
    ParallelConfig(dp=3, dp_mode="fsdp"),
]


@pytest.mark.parametrize("case", ["tied-gelu-tanh", "qwen3-kv1-257", "qwen2-kv2-tied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda c: f"tp{c.tp}pp{c.pp}{c.dp_mode}{c.dp or ''}")
def test_every_layout_writes_the_same_bytes(case: str, layout: ParallelConfig, ranks: Ranks, tmp_path: Path) -> None:
    save_case(case, tmp_path / "source")
    write_at(tmp_path / "source", tmp_path, (1,))
    processes = layout.tp * layout.pp * (layout.dp or 1)
    ranks(write_laid_out, processes, tmp_path / "source", tmp_path / "there", layout)
    assert same_bytes(tmp_path / "1", tmp_path / "there")


def with_keys_as_values(source: Path, target: Path) -> None:
    """On a rank, negative control: the table exchanges keys and values when writing."""
    real = llama.split_qkv

    def wrong(rows: Any, kv: int, k: int) -> Any:
        q, key, value = real(rows, kv, k)
        return q, value, key

    llama.split_qkv = wrong
    model = tpformer.load_pretrained(source, mesh=Mesh.create(tp=2, device="cpu"))
    llama.split_qkv = real
    tpformer.save_pretrained(model, target)


def test_a_wrong_table_is_seen(ranks: Ranks, tmp_path: Path) -> None:
    save_case("llama", tmp_path / "source")
    ranks(with_keys_as_values, 2, tmp_path / "source", tmp_path / "there")
    before, after = load_file(tmp_path / "source" / SINGLE), load_file(tmp_path / "there" / SINGLE)
    wrong = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[4] for name in wrong} == {"k_proj", "v_proj"}


def test_many_files_and_another_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tpformer.load_pretrained(save_case("qwen3-kv2-tied", tmp_path / "source"))
    tpformer.save_pretrained(model, tmp_path / "bf16", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert theirs.dtype == torch.bfloat16
    whole = tpformer.full_parameter(model, "embedding.weight")
    assert torch.equal(theirs.model.embed_tokens.weight, whole.bfloat16())
    with safe_open(tmp_path / "bf16" / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_tokenizer_and_special_tokens_go_along(tmp_path: Path) -> None:
    source = save_case("llama", tmp_path / "source")
    table = json.loads((source / "config.json").read_text()) | {"eos_token_id": [7, 8], "bos_token_id": 3}
    (source / "config.json").write_text(json.dumps(table))
    (source / "merges.txt").write_bytes(b"a b\n")
    (source / "tokenizer.json").write_text("{}")
    tpformer.save_pretrained(tpformer.load_pretrained(source), tmp_path / "out", like=source)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["eos_token_id"], written["bos_token_id"]) == ([7, 8], 3)
    assert (tmp_path / "out" / "merges.txt").read_bytes() == b"a b\n"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(ValueError, match="is no model's directory"):
        tpformer.save_pretrained(tpformer.load_pretrained(source), tmp_path / "more", like=tmp_path)
    assert not (tmp_path / "more").exists()


def test_what_is_in_the_way_stays(tmp_path: Path) -> None:
    source = save_case("llama", tmp_path / "source")
    model = tpformer.load_pretrained(source)
    before = (source / SINGLE).read_bytes()
    with pytest.raises(ValueError, match="is not empty"):
        tpformer.save_pretrained(model, source)
    assert (source / SINGLE).read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        tpformer.save_pretrained(model, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    shutil.copytree(source, tmp_path / "old")
    with torch.no_grad():
        model.norm.weight.add_(1)
    tpformer.save_pretrained(model, tmp_path / "old", overwrite=True)
    assert torch.equal(load_file(tmp_path / "old" / SINGLE)["model.norm.weight"], model.norm.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "old", "source"]


def test_models_that_have_no_place_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Hugging Face family"):
        config = tpformer.LlamaConfig(101, 32, 1, 4, ffn_hidden_size=40, out_bias=True)
        tpformer.save_pretrained(tpformer.Llama(config), tmp_path / "out")
    with pytest.raises(ValueError, match="only GPT and Llama"):
        tpformer.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "out")
    assert not list(tmp_path.iterdir())
