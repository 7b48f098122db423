"""Weights as a directory: the same bytes from every mesh, cast, one box at a time, and in nobody's way."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.cases import parts
from tests.distributed import Ranks
from tests.proofs.cases import Layout
from tpformer import Mesh
from tpformer.checkpoint import chunks as chunks_module
from tpformer.checkpoint.chunks import Chunk
from tpformer.checkpoint.export import write_weights
from tpformer.mesh import Axis


def export(layout: Layout, directory: Path, dtype: torch.dtype | None = None, **options: bool) -> str:
    """On a rank: write a model's weights; what is raised."""
    mesh = layout.mesh()
    found = [replace(part, dtype=dtype) for part in parts("gpt-untied", mesh, 1) if not part.folder]
    try:
        write_weights(
            chunks_module.chunks(found), directory, {"config.json": {"model_type": "gpt2"}}, mesh.world, **options
        )
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def test_every_mesh_writes_the_same_bytes(tmp_path: Path, ranks: Ranks) -> None:
    files = {}
    for layout in (Layout(1), Layout(2), Layout(4), Layout(2, 2)):
        path = tmp_path / str(layout)
        assert set(ranks(export, layout.world_size, layout, path)) == {"nothing was raised"}
        files[layout] = {p.name: p.read_bytes() for p in path.iterdir()}
    assert files[Layout(1)].keys() == {"config.json", "model.safetensors"}
    assert all(found == files[Layout(1)] for found in files.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(map(str, files))


def test_a_cast_is_torch_s(tmp_path: Path, ranks: Ranks) -> None:
    ranks(export, 2, Layout(2), tmp_path / "as it is")
    ranks(export, 2, Layout(2), tmp_path / "cast", torch.bfloat16)
    whole, cast = (load_file(tmp_path / name / "model.safetensors") for name in ("as it is", "cast"))
    assert all(torch.equal(cast[name], whole[name].bfloat16()) for name in whole)


def test_one_box_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is made when the one before it was written."""
    order: list[str] = []

    def spy(what: str, real: Callable[..., Any], *arguments: Any) -> Any:
        order.append(what)
        return real(*arguments)

    numbers = Chunk.numbers
    monkeypatch.setattr(Chunk, "numbers", lambda chunk: spy("make", numbers, chunk))
    monkeypatch.setattr(os, "pwrite", partial(spy, "write", os.pwrite))
    found = [part for part in parts("gpt-untied", Mesh(), 1) if not part.folder]
    write_weights(chunks_module.chunks(found), tmp_path / "model", {}, Axis("world"))
    made = [i for i, what in enumerate(order) if what == "make"]
    assert len(made) == len(chunks_module.chunks(found)) > 20
    assert all(order[i + 1] == "write" for i in made)


@pytest.mark.parametrize("layout", [Layout(1), Layout(2)], ids=str)
def test_what_is_in_the_way_stays_unless_it_is_to_go(layout: Layout, tmp_path: Path, ranks: Ranks) -> None:
    path, count = tmp_path / "model", layout.world_size
    path.mkdir()
    assert set(ranks(export, count, layout, path)) == {"nothing was raised"}, "it is empty"
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    for error in ranks(export, count, layout, path, torch.bfloat16):
        assert re.match(r"ValueError: .*model is not empty: give another, or ask to overwrite it$", error)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    other = tmp_path / "photos"
    other.mkdir()
    (other / "a.jpg").write_text("x")
    call = ranks(export_over, count, layout, other)
    assert all("photos has no config.json" in error for error in call), call
    assert [p.name for p in other.iterdir()] == ["a.jpg"]
    assert set(ranks(export_over, count, layout, path)) == {"nothing was raised"}
    assert load_file(path / "model.safetensors")["few.rows"].dtype == torch.bfloat16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "photos"]


def export_over(layout: Layout, directory: Path) -> str:
    """The same, over what is there."""
    return export(layout, directory, torch.bfloat16, overwrite=True)


def test_a_directory_that_cannot_be_written_is_no_directory(tmp_path: Path, ranks: Ranks) -> None:
    (tmp_path / "file").write_text("in the way")
    for error in ranks(export, 2, Layout(2), tmp_path / "file" / "model"):
        assert re.match("(NotADirectory|OS)Error: .*Not a directory", error)
