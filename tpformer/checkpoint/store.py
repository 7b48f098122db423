"""Checkpoints of a run: safetensors of whole tensors and JSON, atomic, the same files from every layout.

    checkpoints/step_00000400/
      config.json  generation_config.json  model.safetensors   the weights: a Hugging Face directory
      optimizer/model.safetensors                              exp_avg and exp_avg_sq under the weights' names
      meta.json                                                step, layout, and what the trainer wants to know again
      checksums.json                                           of every byte of the others

A checkpoint is written to a directory of another name, which is renamed at the end: a process killed at any
moment leaves the former checkpoints whole. No pickle is written or read.
"""

import dataclasses
import json
import os
import platform
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.distributed as dist

from tpformer.checkpoint import digests
from tpformer.checkpoint.boxes import boxes
from tpformer.checkpoint.chunks import Chunk, Part
from tpformer.checkpoint.digests import Checksums, Digest
from tpformer.checkpoint.files import put_in_place, sync_directory, write_file
from tpformer.checkpoint.layout import MAX_FILE_BYTES, File, index_of
from tpformer.checkpoint.reading import INDEX, Source, Stored, stored_tensors, summary
from tpformer.checkpoint.storage import SafetensorsWriter, write_chunks
from tpformer.collectives import together
from tpformer.mesh import Axis

META = "meta.json"
OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the `last` ones (0: all), and for good those of steps that `every` divides (0: none)."""

    last: int = 0
    every: int = 0


def save_checkpoint(
    directory: Path,
    step: int,
    found: list[Chunk],
    documents: dict[str, Any],
    group: dist.ProcessGroup | None = None,
    *,
    retention: Retention = Retention(),
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Write this step's checkpoint below `directory`, let go of old ones, and return its path; collective.

    documents: JSON files by name; meta.json gets the step. group: all ranks, on a CPU backend; None: one process.
    Raises OSError (disk full, no permission), on every rank, and leaves no half-written checkpoint behind.
    """
    final = directory / f"step_{step:08d}"
    partial = directory / f".step_{step:08d}.partial"
    meta = {"step": step, **documents.get(META, {})}
    others = {name: document for name, document in documents.items() if name != META}

    def publish(files: list[File], found: list[Digest]) -> None:
        texts = texts_of(files, others)
        texts[digests.NAME] = Checksums.of(files, texts, found).text()
        texts[META] = signed(meta, texts[digests.NAME])
        finish(partial, final, texts)
        prune_checkpoints(directory, retention)

    write_directory(partial, found, publish, group, max_file_bytes)
    return final


def write_directory(
    partial: Path,
    found: list[Chunk],
    publish: Callable[[list[File], list[Digest]], None],
    group: dist.ProcessGroup | None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write every rank's chunks to files in `partial`, which is gone if any rank fails; collective, as write_chunks."""
    chief = group is None or group.rank() == 0
    if chief:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        write_chunks(found, SafetensorsWriter(partial, publish, max_file_bytes), group)
    except BaseException:
        if chief:  # the disk may be full of it
            shutil.rmtree(partial, ignore_errors=True)
        raise


def texts_of(files: list[File], documents: dict[str, Any]) -> dict[str, bytes]:
    """The JSON files beside these files: the documents, and an index where there is more than one file in a folder."""
    texts = {name: text_of(document) for name, document in documents.items()}
    for folder in {file.name.rpartition("/")[0] for file in files}:
        if index := index_of(files, folder):
            texts[f"{folder}/{INDEX}".lstrip("/")] = text_of(index)
    return dict(sorted(texts.items()))


def text_of(document: dict[str, Any] | bytes) -> bytes:
    """A JSON file; bytes are one already."""
    return document if isinstance(document, bytes) else (json.dumps(document, indent=2) + "\n").encode()


def signed(meta: dict[str, Any], checksums: bytes) -> bytes:
    """The meta.json beside this checksums.json: both are under a checksum."""
    meta = meta | {"checksums": zlib.crc32(checksums)}
    return text_of(meta | {"crc32": _crc32(meta)})


def finish(partial: Path, final: Path, texts: dict[str, bytes]) -> None:
    """Write the small files, the last of them last, and give the directory its name."""
    for name, text in texts.items():
        write_file(partial / name, text)
    for folder in [p for p in partial.iterdir() if p.is_dir()]:
        sync_directory(folder)
    sync_directory(partial)
    put_in_place(partial, final)


def load_checkpoint(
    path: Path, parts: list[Part], world: Axis, check: Callable[[dict[str, Any]], None] = lambda meta: None
) -> dict[str, Any]:
    """Fill this rank's parts from a checkpoint written at any layout, in place, and return its meta; collective.

    check: raises ValueError for a meta that is not wanted. Then all bytes are verified, each rank reading a share; and
    then each rank reads its boxes. Raises ValueError, on every rank and naming the file and tensor, for what is
    missing, damaged or truncated, and for another shape.
    """
    together(lambda: check(read_meta(path)), world)
    meta = together(lambda: verify(path, world.rank, world.size), world)
    if not meta.get("updates") and not (path / OPTIMIZER).exists():  # weights from elsewhere: no moments yet
        parts = _with_zero_moments(parts)
    stored = together(lambda: _fitting(path, parts), world)
    together(lambda: _fill(stored, parts), world)
    return meta


def verify(
    path: Path, rank: int = 0, ranks: int = 1, progress: Callable[[int], object] | None = None
) -> dict[str, Any]:
    """Verify a rank's share of a checkpoint's numbers, and all else of it; its meta. Raises ValueError as above."""
    meta = read_meta(path)
    sums = read_checksums(path, meta)
    sums.check_files(path)
    sums.check_chunks(path, rank, ranks, progress)
    return meta


def read_checksums(path: Path, meta: dict[str, Any]) -> Checksums:
    """What a checkpoint says of its files. Raises ValueError if that is missing or damaged."""
    try:
        text = (path / digests.NAME).read_bytes()
        if zlib.crc32(text) != meta["checksums"]:
            raise ValueError(f"it is not that of {META}")
        return Checksums.read(text)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path / digests.NAME} is missing or damaged: {error}") from error


def read_meta(path: Path) -> dict[str, Any]:
    """The meta.json of a checkpoint. Raises ValueError if it is missing or damaged."""
    try:
        meta = json.loads((path / META).read_bytes())
        crc32 = meta.pop("crc32")
        if crc32 != _crc32(meta):
            raise ValueError("its checksum differs")
        return meta
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a checkpoint: its meta.json is missing or damaged ({error!r})") from error


def plain(config: Any) -> dict[str, Any]:
    """A model's config as meta.json has it."""
    return {"kind": type(config).__name__} | dataclasses.asdict(config)


def versions() -> dict[str, str]:
    """Of what writes a checkpoint."""
    return {"python": platform.python_version(), "torch": torch.__version__, "safetensors": safetensors.__version__}


def latest_checkpoint(directory: Path) -> Path | None:
    """The complete checkpoint of the highest step below `directory`, if there is one."""
    # a writer killed while it saved a step again may have left that step's former checkpoint aside
    found = [p.parent for pattern in ("step_*", ".step_*.replaced") for p in directory.glob(f"{pattern}/{META}")]
    return max(found, key=lambda p: (p.name.strip(".").removesuffix(".replaced"), p.name[0] != "."), default=None)


def prune_checkpoints(directory: Path, retention: Retention) -> None:
    """Remove the checkpoints that are not to stay, and what killed writers left."""
    complete = sorted(p.parent for p in directory.glob(f"step_*/{META}"))
    old = complete[: -retention.last] if retention.last else []
    for path in [*directory.glob(".step_*"), *(p for p in old if not _for_good(p, retention.every))]:
        if not path.name.startswith("."):  # hidden first: what is half removed is no checkpoint
            os.rename(path, path := path.with_name(f".{path.name}.removed"))
        shutil.rmtree(path, ignore_errors=True)


def _for_good(path: Path, every: int) -> bool:
    return every > 0 and int(path.name.removeprefix("step_")) % every == 0


def _crc32(meta: dict[str, Any]) -> int:
    """Of what meta.json says, however it is written."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _with_zero_moments(parts: list[Part]) -> list[Part]:
    """The weights, which are left to read."""
    for part in parts:
        if part.folder == OPTIMIZER:
            part.local.zero_()
    return [part for part in parts if part.folder != OPTIMIZER]


def _fitting(path: Path, parts: list[Part]) -> dict[str, Stored]:
    """The headers' tensors by name. Raises ValueError naming those that the parts need, but have not or otherwise."""
    stored: dict[str, Stored] = {}
    for folder in {part.folder for part in parts}:
        stored |= stored_tensors(path / folder)
    wrong = []
    for part in parts:
        for tensor, shape in part.kept.shapes(part.placement.shape).items():
            if tensor not in stored:
                wrong.append(f"{tensor} is missing")
            elif stored[tensor].shape != shape:
                wrong.append(f"{tensor} has shape {stored[tensor].shape}, but the model needs {shape}")
    if wrong:
        raise ValueError(f"{path} is another model's checkpoint: {summary(wrong)}")
    return stored


def _fill(stored: dict[str, Stored], parts: list[Part]) -> None:
    with Source(stored) as source:
        for part in parts:
            source.fill(part.local, boxes(part.kept, part.placement))
