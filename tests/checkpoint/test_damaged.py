"""What cannot be written or read ends every rank with an error that names it, and leaves the former checkpoint."""

import errno
import json
import re
import resource
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests.checkpoint.cases import blank, known_of, load, parts, save
from tests.distributed import Ranks
from tests.proofs.cases import Layout
from tpformer.checkpoint import store
from tpformer.checkpoint.store import latest_checkpoint, load_checkpoint, save_checkpoint

MODEL = "gpt-untied"
FILE = "part_00001_of_00002.safetensors"


# 1. reading


def edit_header(path: Path, change: Callable[[list[dict[str, object]]], object]) -> None:
    """Write a file again with other entries in its list of slices."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["slices"])
    change(entries)
    save_file(load_file(path), path, metadata={"slices": json.dumps(entries)})


def drop(name: str) -> Callable[[list[dict[str, object]]], object]:
    """Leave the slices of one tensor out."""

    def change(entries: list[dict[str, object]]) -> None:
        entries[:] = [entry for entry in entries if entry["tensor"] != name]

    return change


def drop_everywhere(path: Path, name: str) -> None:
    """Leave a tensor out of every file of a checkpoint."""
    for file in path.glob("*.safetensors"):
        edit_header(file, drop(name))


def truncate(path: Path, part: float) -> None:
    """Leave the first part of a file."""
    path.write_bytes(path.read_bytes()[: round(path.stat().st_size * part)])


# what happens to the checkpoint, and what the error must say
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is missing": (lambda p: (p / FILE).unlink(), FILE),
    "a file is cut in half": (lambda p: truncate(p / FILE, 0.5), FILE),
    "a file lacks its last bytes": (lambda p: truncate(p / FILE, 0.9999), FILE),
    "a file is empty": (lambda p: truncate(p / FILE, 0), FILE),
    "a file is something else": (lambda p: (p / FILE).write_bytes(b"\x80\x04 not numbers" * 99), FILE),
    "a file is without slices": (lambda p: save_file(load_file(p / FILE), p / FILE), FILE),
    "a slice is not in its file": (
        lambda p: edit_header(p / FILE, lambda entries: entries[0].update(key="elsewhere")),
        FILE,
    ),
    "a slice is not described": (lambda p: edit_header(p / FILE, lambda entries: entries[0].pop("start")), FILE),
    "a tensor is missing": (lambda p: drop_everywhere(p, "exp_avg/norm.weight"), "exp_avg/norm.weight is missing"),
    "a part of a tensor is missing": (
        lambda p: edit_header(p / FILE, drop("weight/embedding.weight")),
        "weight/embedding.weight: .* holds (2048 of the 3232|0 of the 1184) elements",
    ),
    "meta.json is missing": (lambda p: (p / "meta.json").unlink(), "meta.json"),
    "meta.json is cut": (lambda p: truncate(p / "meta.json", 0.5), "meta.json"),
    "meta.json is binary": (lambda p: (p / "meta.json").write_bytes(b"\xff\xfe\x00"), "meta.json"),
    "meta.json is a list": (lambda p: (p / "meta.json").write_text("[]"), "meta.json"),
    "meta.json says nothing": (lambda p: (p / "meta.json").write_text("{}"), "meta.json"),
    "meta.json says nonsense": (lambda p: (p / "meta.json").write_text('{"parts": "two", "step": 1}'), "meta.json"),
    "nothing is there": (lambda p: shutil.rmtree(p), "meta.json"),
}


def errors_of_loading(layout: Layout, paths: list[Path]) -> list[str]:
    """On a rank: what loading each path raises."""
    mesh = layout.mesh()
    known = known_of(MODEL, mesh)
    found = []
    for path in paths:
        try:
            load_checkpoint(path, blank(parts(known, 0)), known, mesh)
            found.append("nothing was raised")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


@pytest.mark.parametrize("layout", [Layout(1), Layout(2), Layout(2, 2)], ids=str)
def test_damage_is_a_value_error_that_names_it_on_every_rank(layout: Layout, tmp_path: Path, ranks: Ranks) -> None:
    ranks(save, 2, Layout(2), tmp_path, 1, MODEL)
    paths = []
    for number, (damage, _) in enumerate(DAMAGE.values()):
        paths.append(tmp_path / str(number) / "step_00000001")
        shutil.copytree(tmp_path / "step_00000001", paths[-1])
        damage(paths[-1])
    for found in ranks(errors_of_loading, layout.world_size, layout, [*paths, tmp_path / "step_00000001"]):
        assert found[-1] == "nothing was raised"  # the one that nobody damaged
        for (name, (_, text)), path, error in zip(DAMAGE.items(), paths, found, strict=False):
            assert error.startswith("ValueError: "), (name, error)
            assert re.search(text, error), (name, error)
            assert str(path) in error, (name, error)
            assert "\n" not in error, (name, error)


@pytest.mark.parametrize("layout", [Layout(1), Layout(4)], ids=str)
def test_another_model_s_checkpoint_is_refused_by_name(layout: Layout, tmp_path: Path, ranks: Ranks) -> None:
    ranks(save, 2, Layout(2), tmp_path, 1, "llama-kv1-tied")
    path = tmp_path / "step_00000001"
    for (error,) in ranks(errors_of_loading, layout.world_size, layout, [path]):
        assert re.match(r"ValueError: weight/position\.weight is missing in .*another model's checkpoint\?", error)


def other_shape(layout: Layout, path: Path) -> str:
    """On a rank: what is raised where the model has one more row than the checkpoint."""
    mesh = layout.mesh()
    known = known_of(MODEL, mesh)
    tensors = blank(parts(known, 0))
    known["few.rows"] = replace(known["few.rows"], shape=(6, 2))
    try:
        load_checkpoint(path, tensors, known, mesh)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_another_shape_is_refused_by_name(tmp_path: Path, ranks: Ranks) -> None:
    ranks(save, 2, Layout(2), tmp_path, 1, MODEL)
    for error in ranks(other_shape, 2, Layout(2), tmp_path / "step_00000001"):
        assert re.match(r"weight/few\.rows has shape \(5, 2\) in .*step_00000001, but the model needs \(6, 2\)", error)


def one_rank_cannot_read(path: Path, rank: int) -> str:
    """On a rank of four: what is raised where one of them cannot open a file."""
    if dist.get_rank() == rank:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "safe_open", refuse)
            return errors_of_loading(Layout(2, 2), [path])[0]
    return errors_of_loading(Layout(2, 2), [path])[0]


def refuse(*_: object, **__: object) -> None:
    """A file that is there but cannot be read."""
    raise PermissionError(13, "Permission denied")


def test_what_one_rank_cannot_read_ends_all(tmp_path: Path, ranks: Ranks) -> None:
    ranks(save, 2, Layout(2), tmp_path, 1, MODEL)
    found = ranks(one_rank_cannot_read, 4, tmp_path / "step_00000001", 2)
    assert len(set(found)) == 1
    assert re.match("ValueError: .*part_00000_of_00002.safetensors .*Permission denied", found[0])


# 2. writing


def save_with(fault: str, directory: Path, step: int, rank: int) -> str:
    """On a rank of 2 x 2: what a save raises in which something goes wrong on one rank."""
    mesh = Layout(2, 2).mesh()
    known = known_of(MODEL, mesh)
    here = mesh.world.rank == rank
    with pytest.MonkeyPatch.context() as patch:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if here and fault == "full":  # a file may not grow beyond this, for the system itself
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        elif here and fault:
            module, name = fault.split(".")
            patch.setattr(getattr(store, module) if module != "store" else store, name, disk_full)
        try:
            save_checkpoint(directory, step, parts(known, step), known, {"note": f"step {step}"}, mesh)
        except OSError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "nothing was raised"


def disk_full(*_: object, **__: object) -> None:
    """As the system says it."""
    raise OSError(errno.ENOSPC, "No space left on device")


FAULTS = [  # on rank 0, which prepares and publishes; on either tp rank of the first replica, which write
    *(("full", 0), ("full", 1), ("store.save_file", 1), ("store._sync", 1)),
    *(("os.rename", 0), ("os.fsync", 0), ("json.dumps", 0), ("store._sync", 0)),
]


@pytest.mark.parametrize(("fault", "rank"), FAULTS)
def test_a_full_disk_ends_every_rank_and_the_former_one_stays(
    fault: str, rank: int, tmp_path: Path, ranks: Ranks
) -> None:
    """An OSError with one text; nothing half written is left; and with space again, saving works again."""
    assert set(ranks(save_with, 4, "", tmp_path, 1, 0)) == {"nothing was raised"}
    errors = ranks(save_with, 4, fault, tmp_path, 2, rank)
    assert len({error.removeprefix("[Errno 28] ") for error in errors}) == 1, errors
    assert re.search("File too large" if fault == "full" else "No space left", errors[0])
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000001"
    assert ranks(load, 2, Layout(2), [tmp_path / "step_00000001"], 1, MODEL) == [[[]], [[]]]
    assert set(ranks(save_with, 4, "", tmp_path, 2, 0)) == {"nothing was raised"}
    assert ranks(load, 2, Layout(2), [tmp_path / "step_00000002"], 2, MODEL) == [[[]], [[]]]


def test_a_directory_that_cannot_be_made_ends_every_rank(tmp_path: Path, ranks: Ranks) -> None:
    (tmp_path / "file").write_text("in the way")
    errors = ranks(save_with, 4, "", tmp_path / "file", 1, 0)
    assert all("Not a directory" in error for error in errors), errors
    assert (tmp_path / "file").read_text() == "in the way"
