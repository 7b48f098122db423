"""A checkpoint has the same bytes from every layout, is read at any other, bit for bit, and holds no pickle."""

import itertools
import json
import os
import pickle
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.checkpoint.cases import (
    KINDS,
    MODELS,
    bits,
    blank,
    differing,
    known_of,
    load,
    load_tiny,
    parts,
    save,
    save_tiny,
    tiny,
    whole,
)
from tests.distributed import Ranks
from tests.proofs.cases import Layout
from tpformer import Mesh
from tpformer.checkpoint import store
from tpformer.checkpoint.chunks import chunks
from tpformer.checkpoint.store import Retention, latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from tpformer.mesh import Axis

LAYOUTS = [Layout(1), Layout(2), Layout(4), Layout(2, 2), Layout(2, 1, True)]
STEP = "step_00000007"


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """For each model the checkpoints of step 7, one from each layout, every other one from the background."""
    found: dict[str, list[Path]] = {}
    for model in MODELS:
        for number, layout in enumerate(LAYOUTS):
            directory = tmp_path_factory.mktemp(f"{model}-{layout}")
            ranks(save, layout.world_size, layout, directory, 7, model, number % 2 == 1)
            found.setdefault(model, []).append(directory / STEP)
    return found


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("model", MODELS)
def test_every_layout_writes_the_same_bytes(model: str, saved: dict[str, list[Path]]) -> None:
    """All but the two files that say who wrote it, and in which chunks."""
    files = [contents(path) for path in saved[model]]
    alone = {"checksums.json", "meta.json"}
    assert files[0].keys() == alone | {"config.json", "model.safetensors", "optimizer/model.safetensors"}
    for other in files[1:]:
        assert {n: t for n, t in other.items() if n not in alone} == {
            n: t for n, t in files[0].items() if n not in alone
        }
    assert len({len(json.loads(f["checksums.json"])["chunks"]) for f in files}) > 1, "not one chunk for a tensor each"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_reads_it(model: str, layout: Layout, saved: dict[str, list[Path]], ranks: Ranks) -> None:
    """Weights and moments bit for bit, the padding zero, and what the trainer wanted to know again."""
    for wrong in ranks(load, layout.world_size, layout, [saved[model][0], saved[model][2]], 7, model):
        assert wrong == [[], []]


@pytest.mark.parametrize("model", MODELS)
def test_the_files_hold_whole_tensors_and_nothing_else(model: str, saved: dict[str, list[Path]]) -> None:
    """Those that are kept as they are, number by number; of the others the shapes; no padding, no gap, no copy."""
    known = known_of(model, Mesh())
    total = 4 * sum(whole("", p.shape, 0).numel() for p in known.values())
    for folder, kinds in (("", KINDS[:1]), ("optimizer", KINDS[1:])):
        path = saved[model][2] / folder / "model.safetensors"
        with safe_open(path, framework="pt") as file:
            for kind in kinds:
                prefix = "" if kind == "weight" else f"{kind}."
                for name in ("scalar", "few.rows"):
                    expected = whole(f"{kind}/{name}", known[name].shape, 7)
                    assert bits(file.get_tensor(prefix + name)) == bits(expected)
                theirs = {"llama-kv1-tied": "model.embed_tokens.weight", "gpt-untied": "transformer.wte.weight"}[model]
                expected = whole(f"{kind}/embedding.weight", known["embedding.weight"].shape, 7)
                assert bits(file.get_tensor(prefix + theirs)) == bits(expected)
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert path.stat().st_size == 8 + length + len(kinds) * total


def test_large_ones_are_several_files_with_an_index(tmp_path: Path) -> None:
    """One that is larger than a file alone; the same numbers read again."""
    found = parts("gpt-untied", Mesh(), 1)
    path = save_checkpoint(tmp_path, 1, chunks(found), {}, max_file_bytes=8000)
    for folder in (path, path / "optimizer"):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = sorted(p.name for p in folder.glob("*.safetensors"))
        assert len(files) > 5
        assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        assert sorted(set(index["weight_map"].values())) == files
        sizes = {}
        for name in files:
            with safe_open(folder / name, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            assert all(index["weight_map"][key] == name for key in tensors)
            sizes[name] = sum(x.nbytes for x in tensors.values())
            assert sizes[name] <= 8000 or len(tensors) == 1
        assert index["metadata"]["total_size"] == sum(sizes.values())
    read = blank(found)
    load_checkpoint(path, read, Axis("world"))
    assert differing(found, read) == []


def test_there_is_no_pickle_in_it(saved: dict[str, list[Path]]) -> None:
    """Two kinds of file, each in its own plain format: JSON, and a length, a JSON header and numbers to the end."""
    for path in itertools.chain(*saved.values()):
        for name, content in contents(path).items():
            if name.endswith(".json"):
                json.loads(content)
            else:
                (length,) = struct.unpack("<Q", content[:8])
                header = json.loads(content[8 : 8 + length])
                ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
                assert name.endswith(".safetensors")
                assert length % 8 == 0
                assert 8 + length + max(ends) == len(content)
            assert not zipfile.is_zipfile(path / name)
            with pytest.raises(Exception):  # noqa: B017
                pickle.loads(content)


def test_saving_and_loading_do_not_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickled")

    for module, name in ((torch, "save"), (torch, "load"), (pickle, "dumps"), (pickle, "loads"), (pickle, "Pickler")):
        monkeypatch.setattr(module, name, refuse)
    found = parts("gpt-untied", Mesh(), 1)
    path = save_checkpoint(tmp_path, 1, chunks(found), {})
    load_checkpoint(path, blank(found), Axis("world"))


def test_other_dtypes_are_stored_as_they_are_or_as_asked_and_read_into_what_is_there(tmp_path: Path) -> None:
    embedding = next(part for part in parts("gpt-untied", Mesh(), 0) if part.kept.name == "embedding.weight")
    x = embedding.local
    for number, dtype in enumerate((torch.float64, torch.float32, torch.float16, torch.bfloat16)):
        asked = replace(embedding, dtype=dtype)
        its_own = replace(embedding, local=x.to(dtype))
        for step, part in ((2 * number, asked), (2 * number + 1, its_own)):
            path = save_checkpoint(tmp_path, step, chunks([part]), {})
            for into in (torch.float64, torch.float32, torch.bfloat16):
                found = replace(part, local=torch.full(x.shape, torch.nan, dtype=into))
                load_checkpoint(path, [found], Axis("world"))
                assert bits(found.local.double()) == bits(x.to(dtype).to(into).double())
    with pytest.raises(ValueError, match=r"transformer.wte.weight is torch.int32; a checkpoint has torch.float64"):
        save_checkpoint(tmp_path, 99, chunks([replace(embedding, dtype=torch.int32)]), {})
    assert not list(tmp_path.glob(".*"))


def test_mixed_dtypes_in_a_file_are_aligned(tmp_path: Path) -> None:
    """As the format asks: a bf16 tensor of odd length before an fp64 one would not be."""
    odd, wide = (
        replace(tiny(1), kept=replace(tiny(1).kept, tensors=(name,)), dtype=dtype)
        for name, dtype in (("a", torch.bfloat16), ("b", torch.float64))
    )
    odd = replace(
        odd, placement=replace(odd.placement, shape=(63,), pieces=(replace(odd.placement.pieces[0], size=63),))
    )
    path = save_checkpoint(tmp_path, 1, chunks([odd, wide]), {})
    content = (path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header["b"]["data_offsets"] == [0, 512]
    assert header["a"]["data_offsets"] == [512, 512 + 126]


def test_everything_is_on_the_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the machine may go down as well as the process: each file, the directories, the rename, its directory."""
    calls: list[str] = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)

        def spy(*arguments: Any, real: Any = real, name: str = name) -> None:
            what = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else str(arguments[0])
            calls.append(f"{name} {Path(what).relative_to(tmp_path)}")
            real(*arguments)

        monkeypatch.setattr(os, name, spy)
    moments = replace(tiny(3), kept=tiny(3).kept.prefixed("exp_avg."), folder="optimizer")
    save_checkpoint(tmp_path, 3, chunks([tiny(3), moments]), {"config.json": {}})
    partial = ".step_00000003.partial"
    assert calls == [
        *(f"fsync {partial}/{x}model.safetensors" for x in ("optimizer/", "", "", "optimizer/")),  # first the headers
        f"fsync {partial}/config.json",
        f"fsync {partial}/checksums.json",
        f"fsync {partial}/meta.json",
        f"fsync {partial}/optimizer",
        f"fsync {partial}",
        f"rename {partial}",
        "fsync .",
    ]


# which one is the latest, and which go


def steps_in(directory: Path) -> list[int]:
    """All that is there, which must be checkpoints."""
    return sorted(int(p.name.removeprefix("step_")) for p in directory.iterdir())


def test_the_latest_is_the_complete_one_of_the_highest_step(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    for step in (900, 1000, 9):
        save_tiny(tmp_path, step)
    (tmp_path / ".step_00002000.partial").mkdir()
    (tmp_path / ".step_00002000.partial" / "meta.json").write_text("{}")
    (tmp_path / "step_00003000").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00001000"
    assert load_tiny(tmp_path / "step_00001000") == (1000, 1000.0)


def test_pruning_keeps_the_latest_and_removes_leftovers(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save_tiny(tmp_path, step)
    for left in (".step_00000009.partial", ".step_00000003.replaced", ".step_00000001.removed"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "model.safetensors").write_bytes(b"x")
    (tmp_path / "notes").mkdir()
    prune_checkpoints(tmp_path, Retention())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", *(f"step_{i:08d}" for i in (1, 2, 3, 10))]
    for last in (2, 2, 5):
        prune_checkpoints(tmp_path, Retention(last))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step_00000003", "step_00000010"]


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(2, 3), [3, 6, 7, 8]),
        (Retention(3, 4), [4, 6, 7, 8]),
        (Retention(1, 10), [8]),
        (Retention(0, 3), [1, 2, 3, 4, 5, 6, 7, 8]),
        (Retention(2), [7, 8]),
    ],
    ids=str,
)
def test_the_last_and_every_so_many_stay(retention: Retention, left: list[int], tmp_path: Path) -> None:
    for step in range(1, 9):
        save_tiny(tmp_path, step, retention=retention)
    assert steps_in(tmp_path) == left


def test_pruning_goes_on_where_a_killed_one_stopped(tmp_path: Path) -> None:
    """A leftover of the same step is in the way of nothing."""
    for step in (1, 2):
        save_tiny(tmp_path, step)
    (tmp_path / ".step_00000001.removed").mkdir()
    (tmp_path / ".step_00000001.removed" / "meta.json").write_text("{}")
    prune_checkpoints(tmp_path, Retention(1))
    assert steps_in(tmp_path) == [2]


def test_what_is_half_removed_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it removes the first of two: that one is not among the complete ones any more."""
    for step in (1, 2, 3):
        save_tiny(tmp_path, step)

    def killed(path: Path, **_: object) -> None:
        next(path.glob("*.safetensors")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store.shutil, "rmtree", killed)
        prune_checkpoints(tmp_path, Retention(1))
    assert [load_tiny(path)[0] for path in sorted(tmp_path.glob("step_*"))] == [2, 3]
    prune_checkpoints(tmp_path, Retention(1))
    assert steps_in(tmp_path) == [3]


def test_a_step_saved_again_is_the_new_one(tmp_path: Path) -> None:
    save_tiny(tmp_path, 4)
    save_tiny(tmp_path, 4, 40.0)
    assert load_tiny(tmp_path / "step_00000004") == (4, 40.0)
    assert steps_in(tmp_path) == [4]
