"""What is damaged is named before a tensor is used, on every rank; other models are refused by name."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests.checkpoint.cases import blank, load, load_tiny, parts, save, save_tiny, sign_again
from tests.distributed import Ranks
from tests.proofs.cases import Layout
from tpformer import Mesh
from tpformer.checkpoint import store
from tpformer.checkpoint.chunks import chunks
from tpformer.checkpoint.store import load_checkpoint, verify

MODEL = "gpt-untied"
STEP = "step_00000001"
WEIGHTS, MOMENTS = "model.safetensors", "optimizer/model.safetensors"


def truncate(path: Path, part: float) -> None:
    """Leave the first part of a file."""
    path.write_bytes(path.read_bytes()[: round(path.stat().st_size * part)])


def half_copied(path: Path) -> None:
    """As large as it should be, but the second half never came."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def flip(path: Path, position: int) -> None:
    """One bit of one byte."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write a file of tensors again after a change."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# what happens to the checkpoint, and what the error must say
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is missing": (lambda p: (p / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "a file of the optimizer is missing": (lambda p: (p / MOMENTS).unlink(), f"{MOMENTS} is missing"),
    "the optimizer is missing": (lambda p: shutil.rmtree(p / "optimizer"), f"{MOMENTS} is missing"),
    "a file is cut in half": (lambda p: truncate(p / WEIGHTS, 0.5), rf"{WEIGHTS} is truncated: .*, \S+ is not whole"),
    "a file lacks its last bytes": (
        lambda p: truncate(p / MOMENTS, 0.9999),
        rf"{MOMENTS} is truncated: .*, exp_avg_sq.transformer.wte.weight is not whole",
    ),
    "a file is cut in its header": (lambda p: truncate(p / WEIGHTS, 0.001), f"{WEIGHTS} is truncated"),
    "a file is empty": (lambda p: truncate(p / WEIGHTS, 0), f"{WEIGHTS} is truncated: 0 of"),
    "a file is half copied": (
        lambda p: half_copied(p / MOMENTS),
        rf"{MOMENTS} .* checksum of optimizer/exp_avg",
    ),
    "a file has more": (
        lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes() + b"x"),
        f"{WEIGHTS} is damaged",
    ),
    "a file is something else": (lambda p: (p / WEIGHTS).write_bytes(b"\x80\x04 not numbers" * 99), WEIGHTS),
    "a number is another": (
        lambda p: flip(p / WEIGHTS, -1),
        rf"{WEIGHTS} is damaged: the checksum of transformer.wte.weight\[\d+:101, 0:32\]",
    ),
    "a header has another byte": (lambda p: flip(p / MOMENTS, 200), f"{MOMENTS} is damaged: the checksum of its first"),
    "a document has another byte": (lambda p: flip(p / "config.json", 3), "config.json is damaged"),
    "a document is missing": (lambda p: (p / "config.json").unlink(), "config.json is missing"),
    "checksums.json is missing": (lambda p: (p / "checksums.json").unlink(), "checksums.json is missing"),
    "checksums.json has another byte": (lambda p: flip(p / "checksums.json", 300), "checksums.json is .*damaged"),
    "meta.json is missing": (lambda p: (p / "meta.json").unlink(), "meta.json"),
    "meta.json is cut": (lambda p: truncate(p / "meta.json", 0.5), "meta.json"),
    "meta.json is binary": (lambda p: (p / "meta.json").write_bytes(b"\xff\xfe\x00"), "meta.json"),
    "meta.json is a list": (lambda p: (p / "meta.json").write_text("[]"), "meta.json"),
    "meta.json says nothing": (lambda p: (p / "meta.json").write_text("{}"), "meta.json"),
    "meta.json says another step": (
        lambda p: (p / "meta.json").write_text((p / "meta.json").read_text().replace('"step": 1', '"step": 2')),
        "meta.json",
    ),
    "nothing is there": (lambda p: shutil.rmtree(p), "meta.json"),
}


def errors_of_loading(layout: Layout, paths: list[Path]) -> list[str]:
    """On a rank: what loading each path raises, before anything of what is to be filled has changed."""
    mesh = layout.mesh()
    needed, found = parts(MODEL, mesh, 0), []
    for path in paths:
        filled = blank(needed)
        try:
            load_checkpoint(path, filled, mesh.world)
            found.append("nothing was raised")
        except Exception as error:
            assert all(part.local.isnan().all() for part in filled), "a tensor was used"
            found.append(f"{type(error).__name__}: {error}")
    return found


@pytest.mark.parametrize("layout", [Layout(1), Layout(2), Layout(2, 2)], ids=str)
def test_damage_is_a_value_error_that_names_it_on_every_rank(layout: Layout, tmp_path: Path, ranks: Ranks) -> None:
    ranks(save, 2, Layout(2), tmp_path, 1, MODEL)
    paths = []
    for number, (damage, _) in enumerate(DAMAGE.values()):
        paths.append(tmp_path / str(number) / STEP)
        shutil.copytree(tmp_path / STEP, paths[-1])
        damage(paths[-1])
    for found in ranks(errors_of_loading, layout.world_size, layout, [*paths, tmp_path / STEP]):
        assert found[-1] == "nothing was raised"  # the one that nobody damaged
        for (name, (_, text)), path, error in zip(DAMAGE.items(), paths, found, strict=False):
            assert error.startswith("ValueError: "), (name, error)
            assert re.search(text, error), (name, error)
            assert str(path) in error, (name, error)
            assert "\n" not in error, (name, error)


def test_no_byte_of_any_file_can_be_another(tmp_path: Path) -> None:
    """Each in turn: the error names its file."""
    path = save_tiny(tmp_path, 1)
    verify(path)
    seen = 0
    for file in (p for p in path.rglob("*") if p.is_file()):
        content = file.read_bytes()
        for position in range(len(content)):
            flip(file, position)
            with pytest.raises(ValueError, match=re.escape(file.name)):
                verify(path)
            file.write_bytes(content)
            seen += 1
    assert seen > 500
    assert load_tiny(path) == (1, 1.0)


def test_the_checksums_are_shared_out_and_none_is_left_out(tmp_path: Path) -> None:
    """Of three ranks each byte is read by one, and each reads about as much."""
    mesh = Mesh()
    found = parts(MODEL, mesh, 1)
    path = store.save_checkpoint(tmp_path, 1, chunks(found), {})
    seen: list[list[int]] = []
    for rank in range(3):
        seen.append([])
        verify(path, rank, 3, progress=seen[-1].append)
    sizes = [sum(mine) for mine in seen]
    assert sum(sizes) == 4 * sum(math.prod(part.placement.shape) for part in found)
    assert max(sizes) < 1.2 * min(sizes)
    flip(path / MOMENTS, -1)
    complaints = []
    for rank in range(3):
        try:
            verify(path, rank, 3)
        except ValueError:
            complaints.append(rank)
    assert len(complaints) == 1


# 2. another model's


@pytest.mark.parametrize("layout", [Layout(1), Layout(4)], ids=str)
def test_another_model_s_checkpoint_is_refused_by_name(layout: Layout, tmp_path: Path, ranks: Ranks) -> None:
    ranks(save, 2, Layout(2), tmp_path, 1, "llama-kv1-tied")
    for (error,) in ranks(errors_of_loading, layout.world_size, layout, [tmp_path / STEP]):
        assert re.match(
            rf"ValueError: .*{STEP} is another model's checkpoint: transformer\.\S+ is missing; .* and \d+ more$", error
        )


def other_shape(layout: Layout, path: Path) -> str:
    """On a rank: what is raised where the model has one more row than the checkpoint."""
    mesh = layout.mesh()
    found = [
        replace(p, placement=replace(p.placement, shape=(6, 2))) if p.kept.tensors == ("few.rows",) else p
        for p in parts(MODEL, mesh, 0)
    ]
    try:
        load_checkpoint(path, found, mesh.world)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_another_shape_is_refused_by_name(tmp_path: Path, ranks: Ranks) -> None:
    ranks(save, 2, Layout(2), tmp_path, 1, MODEL)
    for error in ranks(other_shape, 2, Layout(2), tmp_path / STEP):
        assert re.search(rf"{STEP} is another .*: few\.rows has shape \(5, 2\), but the model needs \(6, 2\)", error)


def not_wanted(path: Path) -> str:
    """On a rank of two: what is raised where rank 1 does not want that run's checkpoint."""
    mesh = Layout(2).mesh()

    def check(meta: dict[str, Any]) -> None:
        if mesh.tp.rank == 1:
            raise ValueError(f"not {meta['note']}")

    try:
        load_checkpoint(path, parts(MODEL, mesh, 0), mesh.world, check)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_what_one_rank_does_not_want_none_loads(tmp_path: Path, ranks: Ranks) -> None:
    ranks(save, 2, Layout(2), tmp_path, 1, MODEL)
    assert ranks(not_wanted, 2, tmp_path / STEP) == ["not step 1"] * 2


def one_rank_cannot_read(path: Path, rank: int) -> str:
    """On a rank of four: what is raised where one of them cannot open a file."""
    if dist.get_rank() == rank:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "stored_tensors", refuse)
            return errors_of_loading(Layout(2, 2), [path])[0]
    return errors_of_loading(Layout(2, 2), [path])[0]


def refuse(*_: object, **__: object) -> None:
    """A file that is there but cannot be read."""
    raise PermissionError(13, "Permission denied", "model.safetensors")


def test_what_one_rank_cannot_read_ends_all(tmp_path: Path, ranks: Ranks) -> None:
    ranks(save, 2, Layout(2), tmp_path, 1, MODEL)
    found = ranks(one_rank_cannot_read, 4, tmp_path / STEP, 2)
    assert all(re.search("Permission denied: 'model.safetensors'", error) for error in found)


def test_what_was_changed_and_signed_again_is_believed(tmp_path: Path, ranks: Ranks) -> None:
    """The tests' own tool for a checkpoint that is whole and says something else."""
    ranks(save, 2, Layout(2), tmp_path, 1, MODEL)
    path = tmp_path / STEP
    rewrite(path / WEIGHTS, lambda tensors: tensors["few.rows"].zero_())
    with pytest.raises(ValueError, match="damaged"):
        verify(path)
    sign_again(path)
    verify(path)
    assert ranks(load, 1, Layout(1), [path], 1, MODEL) == [[["few.rows"]]]
    assert json.loads((path / "meta.json").read_text())["note"] == "step 1"
