"""Reading safetensors by boxes: a rank's slices of whole tensors, from one file or many, and nothing else of them."""

import json
import math
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tpformer.checkpoint.boxes import Box

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """One whole tensor of a file."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a Hugging Face directory by name, from the files' headers.

    A single file goes before an index, as in transformers.
    Raises ValueError naming a file that is missing, damaged or truncated, and tensors on which file and index differ.
    """
    index = directory / INDEX
    if (directory / SINGLE).is_file():
        return header(directory / SINGLE)
    if not index.is_file():
        raise ValueError(f"{directory} holds no {SINGLE} and no {INDEX}{_pickles(directory)}")
    try:
        where: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = sorted({str(file) for file in where.values()})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from error
    if outside := [file for file in files if Path(file).name != file]:
        raise ValueError(f"{index} names files of other directories: {', '.join(outside)}")
    found = {name: stored for file in files for name, stored in header(directory / file).items()}
    wrong = [f"{name} is not in {file}" for name, file in where.items() if _file(found, name) != file]
    wrong += [f"{name} is in {_file(found, name)} only" for name in found if name not in where]
    if wrong:
        raise ValueError(f"{index} and its files differ: {summary(wrong)}")
    return found


def header(path: Path) -> dict[str, Stored]:
    """Every tensor of one safetensors file. Raises ValueError if the file is missing, damaged or truncated."""
    try:
        with safe_open(path, framework="pt") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Stored(path, name, tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing, damaged or truncated: {error}") from error


class Source:
    """Opened files of stored tensors, from which boxes are read: `with Source(stored) as source: source.read(box)`."""

    def __init__(self, stored: dict[str, Stored]):
        self._stored = stored
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()

    def read(self, box: Box) -> Tensor:
        """The box's numbers, (*size), on the CPU and in the file's dtype; no other bytes are asked for."""
        stored = self._stored[box.tensor]
        if stored.file not in self._files:
            self._files[stored.file] = self._stack.enter_context(safe_open(stored.file, framework="pt"))
        file = self._files[stored.file]
        return file.get_slice(stored.name)[box.index] if box.start else file.get_tensor(stored.name)

    def fill(self, local: Tensor, places: Iterable[Box]) -> None:
        """Write all these boxes into this rank's part of a parameter, in its dtype; padding becomes zero."""
        places = list(places)
        with torch.no_grad():
            if sum(math.prod(box.size) for box in places) < local.numel():  # otherwise it would be written twice
                local.zero_()
            for box in places:
                box.put(local, self.read(box))


def differences(stored: dict[str, Stored], expected: dict[str, tuple[int, ...]]) -> list[str]:
    """What is missing, unknown, misshapen or of a dtype that is no plain float."""
    wrong = [f"missing {name}" for name in expected if name not in stored]
    wrong += [f"unknown {name}" for name in stored if name not in expected]
    for name, found in stored.items():
        if name in expected and found.shape != expected[name]:
            wrong.append(f"{name} has shape {found.shape}, expected {expected[name]}")
        if name in expected and found.dtype not in DTYPES:
            wrong.append(f"{name} has dtype {found.dtype}, supported are {', '.join(DTYPES)}")
    return wrong


def renamed(stored: dict[str, Stored], prefix: str, ignored: Iterable[str]) -> dict[str, Stored]:
    """With the prefix that a family's base model leaves off, and without what is no weight."""
    if not any(name.startswith(prefix) for name in stored):
        stored = {name if name.startswith("lm_head.") else prefix + name: each for name, each in stored.items()}
    return {name: each for name, each in stored.items() if not any(re.search(p, name) for p in ignored)}


def summary(wrong: list[str], most: int = 8) -> str:
    """The first of them in a line, and how many more there are."""
    return "; ".join(wrong[:most]) + (f"; and {len(wrong) - most} more" if len(wrong) > most else "")


def _file(found: dict[str, Stored], name: str) -> str | None:
    return found[name].file.name if name in found else None


def _pickles(directory: Path) -> str:
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
        return ": its weights are pickles, which are never loaded; save them with transformers' save_pretrained first"
    return "" if directory.is_dir() else ": there is no such directory"
