"""Directories that are damaged, incomplete or of another model: one message that names all of it, on every rank."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tpformer
from tests.checkpoint.directories import edit_config, save_case
from tests.distributed import Ranks
from tpformer import Mesh
from tpformer.checkpoint.reading import INDEX, SINGLE


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file; many files; tied."""
    root = tmp_path_factory.mktemp("made")
    return {
        "one": save_case("qwen2-kv1", root / "one"),
        "many": save_case("qwen2-kv1", root / "many", max_shard_size="12KB"),
        "tied": save_case("llama-kv2-tied", root / "tied"),
    }


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE)


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def cut(path: Path, at: int) -> None:
    path.write_bytes(path.read_bytes()[:at])


def index(directory: Path, change: Callable[[dict[str, str]], Any]) -> None:
    table = json.loads((directory / INDEX).read_text())
    change(table["weight_map"])
    (directory / INDEX).write_text(json.dumps(table))


Q = "model.layers.1.self_attn.q_proj.weight"
WRONG: list[tuple[str, Callable[[Path], Any], tuple[str, ...]]] = [
    ("one", lambda d: rewrite(d, lambda t: t.pop(Q)), (f"missing {Q}",)),
    ("one", lambda d: rewrite(d, lambda t: t.update(more=torch.ones(2))), ("unknown more",)),
    ("one", lambda d: rewrite(d, lambda t: t.update({Q: t[Q][1:].clone()})), (f"{Q} has shape (31, 32)", "(32, 32)")),
    ("one", lambda d: rewrite(d, lambda t: t.update({Q: t[Q].t()[:, :8].contiguous()})), (f"{Q} has shape (32, 8)",)),
    ("one", lambda d: rewrite(d, lambda t: t.update({Q: t[Q].to(torch.int8)})), (f"{Q} has dtype I8",)),
    ("one", lambda d: rewrite(d, lambda t: (t.pop(Q), t.pop("model.norm.weight"))), (Q, "model.norm.weight")),
    ("one", lambda d: cut(d / SINGLE, 5), (SINGLE, "missing, damaged or truncated")),
    ("one", lambda d: cut(d / SINGLE, -1), (SINGLE, "missing, damaged or truncated")),
    ("one", lambda d: (d / SINGLE).unlink(), (f"holds no {SINGLE}",)),
    ("one", lambda d: (d / SINGLE).rename(d / "pytorch_model.bin"), ("pickles, which are never loaded",)),
    ("one", lambda d: edit_config(d, num_hidden_layers=3), ("missing model.layers.2.", "and 4 more")),
    ("one", lambda d: edit_config(d, num_hidden_layers=1), ("unknown model.layers.1.", "and 4 more")),
    ("one", lambda d: edit_config(d, num_key_value_heads=2), ("k_proj.weight has shape (8, 32), expected (16, 32)",)),
    ("one", lambda d: edit_config(d, model_type="llama"), ("use_sliding_window (False) is not known",)),
    ("many", lambda d: shards(d)[1].unlink(), ("model-00002-of-", "missing, damaged or truncated")),
    ("many", lambda d: cut(shards(d)[2], 4000), ("model-00003-of-", "missing, damaged or truncated")),
    ("many", lambda d: shutil.copy(shards(d)[0], shards(d)[1]), (INDEX, "differ", "is not in model-00002-of-")),
    ("many", lambda d: index(d, lambda w: w.pop(Q)), (f"{Q} is in", "only")),
    ("many", lambda d: index(d, lambda w: w.update({Q: "../elsewhere.safetensors"})), ("other directories",)),
    ("many", lambda d: cut(d / INDEX, 20), (INDEX, "is damaged")),
    (
        "tied",
        lambda d: rewrite(d, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        ("lm_head.weight differs from the embedding",),
    ),
    (
        "tied",
        lambda d: rewrite(d, lambda t: t.update({"lm_head.weight": torch.cat([t["model.embed_tokens.weight"]] * 2)})),
        ("lm_head.weight has shape",),
    ),
]


@pytest.mark.parametrize(("which", "damage", "words"), WRONG, ids=[" ".join(words)[:48] for _, _, words in WRONG])
def test_it_is_named(
    which: str, damage: Callable[[Path], Any], words: tuple[str, ...], made: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made[which], copy)
    tpformer.load_pretrained(copy)
    damage(copy)
    with pytest.raises(ValueError, match=r".") as caught:
        tpformer.load_pretrained(copy)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_tied_head_of_the_same_weights_is_fine(made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["tied"], copy := tmp_path / "copy")
    rewrite(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    tpformer.load_pretrained(copy)


def test_a_base_models_names(tmp_path: Path) -> None:
    """gpt2's own file on the hub leaves the prefix off, and keeps causal masks among the weights."""
    save_case("tied-gelu-tanh", tmp_path)
    before = tpformer.load_pretrained(tmp_path)
    tensors = {name.removeprefix("transformer."): x for name, x in load_file(tmp_path / SINGLE).items()}
    assert all("transformer" not in name for name in tensors)
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
    save_file(tensors, tmp_path / SINGLE)
    after = tpformer.load_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_no_directory_and_no_such_option(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        tpformer.load_pretrained(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="hidden_sizes"):
        tpformer.load_pretrained(made["one"], hidden_sizes=3)
    with pytest.raises(ValueError, match="has shape"):
        tpformer.load_pretrained(made["one"], ffn_hidden_size=48)


def open_where(directories: list[Path]) -> str:
    """On a rank: open one's own directory, and say what is wrong."""
    mesh = Mesh.create(tp=2, device="cpu")
    try:
        tpformer.load_pretrained(directories[mesh.tp.rank], mesh=mesh)
    except ValueError as error:
        return str(error)
    return ""


def test_every_rank_hears_of_what_one_rank_sees(made: dict[str, Path], ranks: Ranks, tmp_path: Path) -> None:
    """A machine whose copy is not whole: no rank goes on, and none hangs."""
    shutil.copytree(made["one"], copy := tmp_path / "copy")
    cut(copy / SINGLE, -1)
    first, second = ranks(open_where, 2, [made["one"], copy])
    assert first == second
    assert "truncated" in first


def test_a_mesh_that_does_not_fit(made: dict[str, Path], ranks: Ranks) -> None:
    for found in ranks(open_three, 3, made["one"]):
        assert "must be divisible by tp (3)" in found


def open_three(directory: Path) -> str:
    """On one of three ranks."""
    try:
        tpformer.load_pretrained(directory, mesh=Mesh.create(tp=3, device="cpu"))
    except ValueError as error:
        return str(error)
    return ""
