"""Chunks of whole tensors written by many ranks: where each byte goes, and what is refused."""

import itertools
import math
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

from tests.checkpoint.cases import bits, parts, save, tiny
from tests.distributed import Ranks
from tests.proofs.cases import Layout
from tpformer.checkpoint.chunks import Staging, chunks
from tpformer.checkpoint.storage import runs
from tpformer.checkpoint.store import save_checkpoint
from tpformer.placement import Piece


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (3, 1, 5), (2, 3, 4)])
def test_runs_are_where_a_box_s_numbers_are(shape: tuple[int, ...]) -> None:
    """Against numpy, for every box there is."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    ranges = [[(a, b) for a in range(n) for b in range(a + 1, n + 1)] for n in shape]
    for box in itertools.product(*ranges):
        start, size = tuple(a for a, _ in box), tuple(b - a for a, b in box)
        expected = numbers[tuple(slice(a, b) for a, b in box)].ravel()
        found = list(runs(shape, start, size))
        length = len(expected) // len(found)
        assert [first + i for first in found for i in range(length)] == expected.tolist()
    if shape:
        whole = list(runs(shape, (0,) * len(shape), shape))
        assert whole == [0], "what is whole is one stretch"


def read_with_torch(path: Path, name: str, layout: Layout) -> bytes:
    """On a rank: one tensor through torch's own reader of such files, of which each rank asks for all."""
    x = torch.full((101, 32), torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dcp.load({name: x}, storage_reader=HuggingFaceStorageReader(str(path)))
    return bits(x)


def test_torch_reads_them_as_well(tmp_path: Path, ranks: Ranks) -> None:
    """HuggingFaceStorageReader, weights and moments."""
    ranks(save, 2, Layout(2), tmp_path, 1, "gpt-untied")
    path = tmp_path / "step_00000001"
    for folder, name in ((path, "transformer.wte.weight"), (path / "optimizer", "exp_avg.transformer.wte.weight")):
        expected = bits(load_file(folder / "model.safetensors")[name])
        assert ranks(read_with_torch, 2, folder, name, Layout(2)) == [expected] * 2


def test_a_short_write_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may take only a part."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, content, offset: real(fd, content[:7], offset))
    path = save_checkpoint(tmp_path, 1, chunks([tiny(5)]), {})
    assert load_file(path / "model.safetensors")["w"].tolist() == [5.0] * 64


def with_placement(name: str, change: dict[str, Any], directory: Path) -> str:
    """On a rank of two: save with one parameter's placement changed on rank 1; what is raised."""
    mesh = Layout(2).mesh()
    found = parts("gpt-untied", mesh, 1)
    if mesh.tp.rank == 1:
        found = [
            replace(p, placement=replace(p.placement, **change)) if p.kept.tensors[0] == name else p for p in found
        ]
    try:
        save_checkpoint(directory, 1, chunks(found), {}, dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("few.rows", {"pieces": (Piece(3, 1),)}, r"parts are not the whole: few\.rows lacks 2 numbers$"),
        ("few.rows", {"pieces": (Piece(2, 2),)}, r"few\.rows has overlapping chunks"),
        ("few.rows", {"pieces": (Piece(0, 2),)}, r"two ranks would write few\.rows at \(0, 0\)"),
        ("scalar", {"pieces": (Piece(0, 1),)}, r"two ranks would write scalar at \(\): one must be a copy"),
        ("few.rows", {"shape": (6, 2)}, r"few\.rows is \(6, 2\) of torch.float32 on one rank and \(5, 2\)"),
        ("few.rows", {"replica": 1}, r"few\.rows lacks 4 numbers$"),
    ],
    ids=["a hole", "an overlap", "the same place", "a copy that is none", "another shape", "not counted"],
)
def test_a_wrong_placement_is_refused_on_every_rank(
    name: str, change: dict[str, Any], text: str, tmp_path: Path, ranks: Ranks
) -> None:
    """Negative control: boxes that do not tile the tensor are no checkpoint."""
    errors = ranks(with_placement, 2, name, change, tmp_path)
    assert errors[0] == errors[1]
    assert re.search(text, errors[0]), errors[0]
    assert list(tmp_path.iterdir()) == []


def swapped(directory: Path) -> None:
    """On a rank of two: save with the ranks' parts of one weight swapped."""
    mesh = Layout(2).mesh()
    found = parts("gpt-untied", mesh, 1)
    other = 1 - mesh.tp.rank
    size = next(p.placement.pieces[0].size for p in found if p.kept.name == "blocks.0.mlp.up.weight")
    found = [
        replace(p, placement=replace(p.placement, pieces=(Piece(other * size, size),)))
        if p.kept.name == "blocks.0.mlp.up.weight"
        else p
        for p in found
    ]
    save_checkpoint(directory, 1, chunks(found), {}, dist.group.WORLD)


def test_a_placement_that_tiles_wrongly_writes_other_bytes(tmp_path: Path, ranks: Ranks) -> None:
    """Negative control of the comparison of bytes: it sees two ranks' rows swapped, in that tensor and no other."""
    ranks(save, 1, Layout(1), tmp_path / "right", 1, "gpt-untied")
    ranks(swapped, 2, tmp_path / "wrong")
    right, wrong = (load_file(tmp_path / d / "step_00000001" / "model.safetensors") for d in ("right", "wrong"))
    differing = [name for name in right if bits(right[name]) != bits(wrong[name])]
    assert differing == ["transformer.h.0.mlp.c_fc.weight"]


def test_a_process_alone_checks_that_tensors_are_whole(tmp_path: Path) -> None:
    part = tiny(1)
    short = replace(part, placement=replace(part.placement, pieces=(Piece(0, 63),)))
    with pytest.raises(ValueError, match="the ranks' parts are not the whole: w lacks 1 numbers"):
        save_checkpoint(tmp_path, 1, chunks([short]), {})
    assert list(tmp_path.iterdir()) == []


def test_staged_numbers_are_those_of_the_moment_and_memory_is_used_again() -> None:
    part, staging = tiny(1), Staging()
    (first,) = staging.copy([part])
    part.local.fill_(2)
    assert first.numbers().unique().tolist() == [1.0]
    (second,) = staging.copy([part])
    assert second.numbers().unique().tolist() == [2.0]
    assert first.numbers().data_ptr() == second.numbers().data_ptr()


def test_chunks_are_read_from_where_they_are(tmp_path: Path) -> None:
    """Without staging nothing is copied before it is written: a contiguous box is a view."""
    part = tiny(1)
    (chunk,) = chunks([part])
    assert chunk.numbers().data_ptr() == part.local.data_ptr()
