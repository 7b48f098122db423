"""From file to file: a checkpoint's weights as a Hugging Face directory, and such a directory as a run's checkpoint.

One process, no process group, one tensor in memory at a time.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpformer.checkpoint.boxes import Box
from tpformer.checkpoint.chunks import Chunk
from tpformer.checkpoint.export import write_weights
from tpformer.checkpoint.huggingface import Pretrained
from tpformer.checkpoint.reading import DTYPES, Source
from tpformer.checkpoint.save import model_documents
from tpformer.checkpoint.store import META, latest_checkpoint, plain, save_checkpoint, verify, versions
from tpformer.mesh import Axis

Progress = Callable[[int], object]
"""Is told how many bytes were read."""


def to_huggingface(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = lambda count: None,
) -> None:
    """Write the weights of a checkpoint, or of a Hugging Face directory, as one: without optimizer, maybe rounded.

    Raises ValueError for a source that is damaged, or of a model that no Hugging Face family has, and for a target
    that is in the way.
    """
    if (source / META).exists():
        verify(source, progress=progress)
        if not (source / "config.json").exists():
            raise ValueError(f"{source} has no config.json: no Hugging Face family has its model")
    opened = Pretrained.open(source)
    documents = model_documents(opened.config, dtype or opened.dtype, source)
    with Source(opened.stored) as files:
        write_weights(_chunks(opened, files, dtype, progress), target, documents, Axis("world"), overwrite=overwrite)


def to_checkpoint(source: Path, target: Path, *, progress: Progress = lambda count: None) -> Path:
    """Write a Hugging Face directory as target/step_00000000, from which `--resume` goes on with fresh moments.

    In fp32, as a run keeps its weights. Raises ValueError for a source that is damaged or not supported, and for a
    target that has checkpoints: a run would go on with the latest of them.
    """
    there = latest_checkpoint(target)
    if there is not None:
        raise ValueError(f"{there} is a checkpoint already: give another target")
    opened = Pretrained.open(source)
    degrees = dict.fromkeys(("pp", "dp", "dp_shard", "tp"), 1)
    meta: dict[str, Any] = {"samples": 0, "updates": 0, "model": plain(opened.config)}
    documents = model_documents(opened.config, torch.float32, source)
    documents[META] = meta | {"layout": degrees, "versions": versions()}
    with Source(opened.stored) as files:
        return save_checkpoint(target, 0, _chunks(opened, files, torch.float32, progress), documents)


def _chunks(opened: Pretrained, files: Source, dtype: torch.dtype | None, progress: Progress) -> list[Chunk]:
    """Every tensor of a directory, to be read when it is written; a tied head is left out, if it is a copy."""
    opened.check_tied(files)
    wanted = [name for kept in opened.names.values() for name in kept.tensors]
    found = []
    for name in wanted:
        stored = opened.stored[name]
        zeros = (0,) * len(stored.shape)
        box = Box(name, zeros, stored.shape, None, (), False, False)
        take = partial(_read, files, box, progress)
        found.append(Chunk(name, stored.shape, zeros, stored.shape, dtype or DTYPES[stored.dtype], take))
    return found


def _read(files: Source, box: Box, progress: Progress) -> Tensor:
    numbers = files.read(box)
    progress(numbers.nbytes)
    return numbers
