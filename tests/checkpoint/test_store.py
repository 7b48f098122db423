"""A checkpoint written at any layout is read at any other, bit for bit; each number is stored once, without pickle."""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.checkpoint.cases import KINDS, MODELS, bits, blank, known_of, load, parts, save, tiny, whole
from tests.distributed import Ranks
from tests.proofs.cases import Layout
from tpformer import Mesh
from tpformer.checkpoint import store
from tpformer.checkpoint.store import latest_checkpoint, load_checkpoint, prune_checkpoints, read_meta, save_checkpoint

LAYOUTS = [Layout(1), Layout(2), Layout(4), Layout(2, 2), Layout(2, 1, True)]


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """For each model the checkpoints of step 7, one from each layout; every rank is told the same path."""
    found: dict[str, list[Path]] = {}
    for model in MODELS:
        for layout in LAYOUTS:
            directory = tmp_path_factory.mktemp(f"{model}-{layout}")
            paths = ranks(save, layout.world_size, layout, directory, 7, model)
            assert set(paths) == {str(directory / "step_00000007")}
            found.setdefault(model, []).append(Path(paths[0]))
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_reads_what_any_layout_wrote(
    model: str, layout: Layout, saved: dict[str, list[Path]], ranks: Ranks
) -> None:
    """Weights and moments bit for bit, the padding zero, and what the trainer wanted to know again."""
    for wrong in ranks(load, layout.world_size, layout, saved[model], 7, model):
        assert wrong == [[]] * len(LAYOUTS)


@pytest.mark.parametrize("model", MODELS)
def test_every_number_is_stored_once(model: str, saved: dict[str, list[Path]]) -> None:
    """Copies, padding and replicas are not: whatever the layout, the slices tile each whole tensor."""
    known = known_of(model, Mesh())
    expected = sum(len(KINDS) * whole("", p.shape, 0).numel() for p in known.values())
    for path, layout in zip(saved[model], LAYOUTS, strict=True):
        files = sorted(path.glob("*.safetensors"))
        assert [file.name for file in files] == [
            f"part_{i:05d}_of_{layout.tp:05d}.safetensors" for i in range(layout.tp)
        ]
        times = {f"{kind}/{name}": torch.zeros(p.shape) for name, p in known.items() for kind in KINDS}
        numbers = 0
        for file in files:
            with safe_open(file, framework="pt") as opened:
                numbers += sum(opened.get_tensor(key).numel() for key in opened.keys())  # noqa: SIM118
                for entry in json.loads(opened.metadata()["slices"]):
                    box = tuple(slice(i, i + n) for i, n in zip(entry["start"], entry["size"], strict=True))
                    place = times[entry["tensor"]][box]
                    place += 1
                    assert opened.get_tensor(entry["key"]).shape == place.shape
        assert numbers == expected
        assert all((count == 1).all() for count in times.values())


def test_there_is_no_pickle_in_it(saved: dict[str, list[Path]]) -> None:
    """Two kinds of file, each in its own plain format: JSON, and a length, a JSON header and numbers to the end."""
    for path in (path for paths in saved.values() for path in paths):
        for file in path.iterdir():
            content = file.read_bytes()
            if file.name == "meta.json":
                json.loads(content)
            else:
                (length,) = struct.unpack("<Q", content[:8])
                header = json.loads(content[8 : 8 + length])
                ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
                assert file.suffix == ".safetensors"
                assert 8 + length + max(ends) == len(content)
            assert not zipfile.is_zipfile(file)
            with pytest.raises(Exception):  # noqa: B017
                pickle.loads(content)


def test_saving_and_loading_do_not_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickled")

    for module, name in ((torch, "save"), (torch, "load"), (pickle, "dumps"), (pickle, "loads"), (pickle, "Pickler")):
        monkeypatch.setattr(module, name, refuse)
    known = known_of("gpt-untied", Mesh())
    path = save_checkpoint(tmp_path, 1, parts(known, 1), known, {}, Mesh())
    load_checkpoint(path, blank(parts(known, 1)), known, Mesh())


def test_other_dtypes_are_stored_as_they_are_and_read_into_what_is_there(tmp_path: Path) -> None:
    known = {"w": known_of("gpt-untied", Mesh())["embedding.weight"]}
    x = whole("w", known["w"].shape, 0)
    for number, dtype in enumerate((torch.float64, torch.float32, torch.bfloat16)):
        path = save_checkpoint(tmp_path, number, {"weight/w": x.to(dtype)}, known, {}, Mesh())
        for into in (torch.float64, torch.float32, torch.bfloat16):
            tensor = torch.full(x.shape, torch.nan, dtype=into)
            load_checkpoint(path, {"weight/w": tensor}, known, Mesh())
            assert bits(tensor.double()) == bits(x.to(dtype).to(into).double())


def test_everything_is_on_the_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the machine may go down as well as the process: each file, their directory, the rename, its directory."""
    calls: list[str] = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)

        def spy(*arguments: Any, real: Any = real, name: str = name) -> None:
            what = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else str(arguments[0])
            calls.append(f"{name} {Path(what).relative_to(tmp_path)}")
            real(*arguments)

        monkeypatch.setattr(os, name, spy)
    write(tmp_path, 3)
    partial = ".step_00000003.partial"
    assert calls == [
        f"fsync {partial}/part_00000_of_00001.safetensors",
        f"fsync {partial}/meta.json",
        f"fsync {partial}",
        f"rename {partial}",
        "fsync .",
    ]


# which one is the latest, and which go


def write(directory: Path, *steps: int) -> None:
    """Tiny checkpoints of these steps."""
    for step in steps:
        tensors, known = tiny(step)
        save_checkpoint(directory, step, tensors, known, {}, Mesh())


def test_the_latest_is_the_complete_one_of_the_highest_step(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    write(tmp_path, 900, 1000, 9)
    (tmp_path / ".step_00002000.partial").mkdir()
    (tmp_path / ".step_00002000.partial" / "meta.json").write_text("{}")
    (tmp_path / "step_00003000").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00001000"
    assert read_meta(tmp_path / "step_00001000") == {"step": 1000, "parts": 1}


def test_pruning_keeps_the_latest_and_removes_leftovers(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 10)
    for left in (".step_00000009.partial", ".step_00000003.replaced", ".step_00000001.removed"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "part_00000_of_00001.safetensors").write_bytes(b"x")
    (tmp_path / "notes").mkdir()
    prune_checkpoints(tmp_path, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", *(f"step_{i:08d}" for i in (1, 2, 3, 10))]
    prune_checkpoints(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step_00000003", "step_00000010"]
    prune_checkpoints(tmp_path, 2)
    prune_checkpoints(tmp_path, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step_00000003", "step_00000010"]


def test_pruning_goes_on_where_a_killed_one_stopped(tmp_path: Path) -> None:
    """A leftover of the same step is in the way of nothing."""
    write(tmp_path, 1, 2)
    (tmp_path / ".step_00000001.removed").mkdir()
    (tmp_path / ".step_00000001.removed" / "meta.json").write_text("{}")
    prune_checkpoints(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000002"]


def test_what_is_half_removed_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it removes the first of two: that one is not among the complete ones any more."""
    write(tmp_path, 1, 2, 3)

    def killed(path: Path, **_: object) -> None:
        next(path.glob("*.safetensors")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store.shutil, "rmtree", killed)
        prune_checkpoints(tmp_path, 1)
    found = {"weight/w": torch.empty(64)}
    for path in tmp_path.glob("step_*"):
        load_checkpoint(path, found, tiny(0)[1], Mesh())
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000002", "step_00000003"]
    prune_checkpoints(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_a_step_saved_again_is_the_new_one(tmp_path: Path) -> None:
    write(tmp_path, 4)
    _, known = tiny(4)
    save_checkpoint(tmp_path, 4, {"weight/w": torch.full((64,), 40.0)}, known, {"again": True}, Mesh())
    found = {"weight/w": torch.empty(64)}
    assert load_checkpoint(tmp_path / "step_00000004", found, known, Mesh())["again"]
    assert found["weight/w"].unique().tolist() == [40.0]
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000004"]
