"""Checkpoints of a run: safetensors and JSON, atomic, readable at any layout.

    checkpoints/step_00000400/
      meta.json                        step, and whatever else the trainer wants to know again
      part_00000_of_00002.safetensors  the slices that each rank of a replica owns; the header says where they belong

A checkpoint is written to a directory of another name, which is renamed at the end: a process killed at any
moment leaves the former checkpoints whole. No pickle is written or read.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tpformer.collectives import raise_together
from tpformer.mesh import Mesh
from tpformer.placement import Placement


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: dict[str, Tensor],
    known: dict[str, Placement],
    meta: dict[str, Any],
    mesh: Mesh,
) -> Path:
    """Write this step's checkpoint below `directory` and return its path; collective.

    tensors: this rank's parts by name; the part after the first "/" names the parameter whose placement it has.
    Raises OSError (disk full, no permission), on every rank, and leaves no half-written checkpoint behind.
    """
    final = directory / f"step_{step:08d}"
    partial = directory / f".step_{step:08d}.partial"
    chief = mesh.world.rank == 0
    shard = mesh.dp_shard
    parts = mesh.pp.size * shard.size * mesh.tp.size
    number = (mesh.pp.rank * shard.size + shard.rank) * mesh.tp.size + mesh.tp.rank

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write() -> None:
        _write_parts(partial / _part_name(number, parts), tensors, known)

    def publish() -> None:
        (partial / "meta.json").write_text(json.dumps({"step": step, "parts": parts, **meta}, indent=1) + "\n")
        _sync(partial / "meta.json")
        _sync(partial)
        if final.exists():  # a step that is saved again: the old one goes only when the new one is in place
            shutil.rmtree(old := directory / f".step_{step:08d}.replaced", ignore_errors=True)
            os.rename(final, old)
            os.rename(partial, final)
            shutil.rmtree(old)
        else:
            os.rename(partial, final)
        _sync(directory)

    try:
        _together(prepare if chief else None, mesh)
        _together(write if mesh.dp_replicate.rank == 0 else None, mesh)  # replicas hold the same
        _together(publish if chief else None, mesh)
    except Exception:
        if chief:  # the disk may be full of it
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def load_checkpoint(path: Path, tensors: dict[str, Tensor], known: dict[str, Placement], mesh: Mesh) -> dict[str, Any]:
    """Fill this rank's parts from a checkpoint written at any layout, in place, and return its meta; collective.

    Each rank reads only its slices. Raises ValueError, on every rank and naming the file or tensor, for a
    missing or damaged file, and for a tensor that is missing or has another shape.
    """
    meta: dict[str, Any] = {}

    def read() -> None:
        meta.update(read_meta(path))
        names = [_part_name(number, meta["parts"]) for number in range(meta["parts"])]
        where: dict[str, list[_Slice]] = {}
        for stored in (s for name in names for s in _slices_of(path / name)):
            where.setdefault(stored.tensor, []).append(stored)
        for name, local in tensors.items():
            _read_parts(name, local, known[name.split("/", 1)[-1]], where.get(name, []), path)

    _together(read, mesh)
    return meta


def read_meta(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint. Raises ValueError if there is none, or if it lacks the step or the layout."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        return {**meta, "step": int(meta["step"]), "parts": int(meta["parts"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a checkpoint: its meta.json is missing or damaged ({error})") from error


def latest_checkpoint(directory: Path) -> Path | None:
    """The complete checkpoint of the highest step below `directory`, if there is one."""
    # a writer killed while it saved a step again may have left that step's former checkpoint aside
    found = [p.parent for pattern in ("step_*", ".step_*.replaced") for p in directory.glob(f"{pattern}/meta.json")]
    return max(found, key=lambda p: (p.name.strip(".").removesuffix(".replaced"), p.name[0] != "."), default=None)


def prune_checkpoints(directory: Path, keep: int) -> None:
    """Remove all but the `keep` latest checkpoints (0 keeps all), and what killed writers left."""
    complete = sorted(p.parent for p in directory.glob("step_*/meta.json"))
    for path in [*directory.glob(".step_*"), *(complete[:-keep] if keep else [])]:
        if not path.name.startswith("."):  # hidden first: what is half removed is no checkpoint
            os.rename(path, path := path.with_name(f".{path.name}.removed"))
        shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class _Slice:
    """One stored box: [start, start + size) along each dim of the whole `tensor` of `shape`."""

    file: Any
    tensor: str
    key: str
    shape: list[int]
    start: list[int]
    size: list[int]


def _part_name(number: int, parts: int) -> str:
    return f"part_{number:05d}_of_{parts:05d}.safetensors"


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Where a slice of a whole tensor of this shape begins, and how long it is, along each dim."""
    ranges = [each.indices(length) for each, length in zip(index, shape, strict=False)]
    ranges += [(0, length, 1) for length in shape[len(ranges) :]]
    return [first for first, _, _ in ranges], [last - first for first, last, _ in ranges]


def _write_parts(path: Path, tensors: dict[str, Tensor], known: dict[str, Placement]) -> None:
    """Write the slices that this rank owns; the header's "slices" says which."""
    stored: dict[str, Tensor] = {}
    entries = []
    for name, local in tensors.items():
        placement = known[name.split("/", 1)[-1]]
        for number, (piece, whole, ours) in enumerate(placement.slices() if placement.counts else ()):
            if piece.copy:
                continue
            key = f"{name}#{number}"
            # a copy even on the CPU: safetensors refuses views that share memory
            stored[key] = local[ours].detach().to("cpu", copy=True).contiguous()
            start, size = _box(whole, placement.shape)
            place = {"shape": list(placement.shape), "start": start, "size": size}
            entries.append({"tensor": name, "key": key, **place})
    try:
        save_file(stored, path, metadata={"slices": json.dumps(entries)})
    except SafetensorError as error:  # which is no OSError, whatever the system said
        raise OSError(f"{path} cannot be written: {error}") from error
    _sync(path)


def _read_parts(name: str, local: Tensor, placement: Placement, slices: list[_Slice], path: Path) -> None:
    """Fill the local part of one tensor from whichever stored slices overlap it."""
    if not slices or tuple(slices[0].shape) != placement.shape:
        found = f"has shape {tuple(slices[0].shape)}" if slices else "is missing"
        raise ValueError(
            f"{name} {found} in {path}, but the model needs {placement.shape}: another model's checkpoint?"
        )
    with torch.no_grad():
        local.zero_()
        for _, whole, ours in placement.slices():
            view, filled = local[ours], 0
            begin, length = _box(whole, placement.shape)
            for s in slices:
                first = [max(a, b) for a, b in zip(begin, s.start, strict=True)]
                last = [min(a + n, b + m) for a, n, b, m in zip(begin, length, s.start, s.size, strict=True)]
                if any(i >= j for i, j in zip(first, last, strict=True)):
                    continue
                source = tuple(slice(i - b, j - b) for i, j, b in zip(first, last, s.start, strict=True))
                target = tuple(slice(i - a, j - a) for i, j, a in zip(first, last, begin, strict=True))
                part = s.file.get_slice(s.key)[source if source else ...]
                view[target] = part.to(view)
                filled += part.numel()
            if filled != view.numel():
                raise ValueError(f"{name}: {path} holds {filled} of the {view.numel()} elements from {begin} on")


def _slices_of(path: Path) -> list[_Slice]:
    """The slices that one file says it holds. Raises ValueError naming the file if it is missing or damaged."""
    try:
        file = safe_open(path, framework="pt")
        slices = [_Slice(file, **entry) for entry in json.loads(file.metadata()["slices"])]
        if lost := {s.key for s in slices} - set(file.keys()):
            raise ValueError(f"it lacks {', '.join(sorted(lost))}")
        return slices
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error


def _together(action: Callable[[], None] | None, mesh: Mesh) -> None:
    """Do it where there is something to do, wait for all, and fail everywhere if it failed anywhere."""
    error: Exception | None = None
    try:
        if action is not None:
            action()
    except Exception as caught:
        error = caught
    raise_together(error, mesh.world)


def _sync(path: Path) -> None:
    """Have the system write a file or directory to the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
