"""Weights as a directory of whole safetensors, written from any mesh: what `save_pretrained` stands on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tpformer.checkpoint.chunks import Chunk
from tpformer.checkpoint.digests import Digest
from tpformer.checkpoint.layout import MAX_FILE_BYTES, File
from tpformer.checkpoint.store import META, finish, texts_of, write_directory
from tpformer.collectives import together
from tpformer.mesh import Axis


def write_weights(
    found: list[Chunk],
    directory: Path,
    documents: dict[str, Any],
    world: Axis,
    *,
    overwrite: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write every rank's chunks as one directory, which appears at the end; collective over the world.

    documents: small files by name. A rank holds one chunk in host memory at a time. overwrite: a directory
    with a config.json is replaced, with all that is in it, but no checkpoint of a run.
    Raises ValueError, on every rank, for a directory that is in the way, OSError for a disk that is full.
    """
    directory = directory.absolute()
    together(lambda: _make_way(directory, overwrite), world)
    partial = directory.with_name(f".{directory.name}.partial")

    def publish(files: list[File], _: list[Digest]) -> None:
        finish(partial, directory, texts_of(files, documents))

    with gloo_group(world) as group:
        write_directory(partial, found, publish, group, max_file_bytes)


@contextmanager
def gloo_group(world: Axis) -> Iterator[dist.ProcessGroup | None]:
    """A group of all ranks on the CPU, for a while; None for a process alone."""
    group = dist.new_group(backend="gloo", group_desc="checkpoint") if world.size > 1 else None
    try:
        yield group
    finally:
        if group is not None:
            dist.destroy_process_group(group)


def _make_way(directory: Path, overwrite: bool) -> None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if (directory / META).exists():
        raise ValueError(f"{directory} is a run's checkpoint, with an optimizer: it is not replaced, give another")
    if not overwrite:
        raise ValueError(f"{directory} is not empty: give another, or ask to overwrite it")
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} has no config.json: a model's directory would be replaced, this one is not")
