"""Checksums of a checkpoint: every byte of its files is in one, and what is damaged is named before it is used.

checksums.json has, for each file, its size and the crc32 of its first bytes (of a safetensors file the header), and
for each chunk of a tensor the crc32 of its numbers in their order, taken from the memory that was written.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tpformer.checkpoint.layout import File

NAME = "checksums.json"


@dataclass(frozen=True)
class Digest:
    """The crc32 of [start, start + size) of one tensor, by its key in the checkpoint."""

    key: str
    start: tuple[int, ...]
    size: tuple[int, ...]
    crc32: int

    @property
    def numbers(self) -> int:
        """How many it is of."""
        return math.prod(self.size)


@dataclass(frozen=True)
class Checksums:
    """What checksums.json says: by file its size, how many of its first bytes are in the crc32, and that."""

    files: dict[str, tuple[int, int, int]]
    tensors: dict[str, str]  # the file of each, by key
    digests: list[Digest]

    @staticmethod
    def of(files: list[File], texts: dict[str, bytes], digests: list[Digest]) -> "Checksums":
        """Of files that are being written; texts: the small ones, whole."""
        found = {file.name: (file.bytes, len(file.header), zlib.crc32(file.header)) for file in files}
        found |= {name: (len(text), len(text), zlib.crc32(text)) for name, text in texts.items()}
        return Checksums(found, {key: file.name for file in files for key in file.offsets}, digests)

    def text(self) -> bytes:
        """As JSON, a line for each file, tensor and chunk."""
        lists: dict[str, list[list[object]]] = {
            "files": [[name, *values] for name, values in self.files.items()],
            "tensors": [[key, name] for key, name in self.tensors.items()],
            "chunks": [[d.key, d.start, d.size, d.crc32] for d in self.digests],
        }
        parts = [
            f'"{name}": [\n' + ",\n".join(json.dumps(entry) for entry in entries) + "\n]"
            for name, entries in lists.items()
        ]
        return ("{" + ",\n".join(parts) + "}\n").encode()

    @staticmethod
    def read(text: bytes) -> "Checksums":
        """Of the JSON. Raises ValueError, KeyError or TypeError if it is none."""
        lists = json.loads(text)
        return Checksums(
            {name: (size, first, crc32) for name, size, first, crc32 in lists["files"]},
            dict(lists["tensors"]),
            [Digest(key, tuple(start), tuple(size), crc32) for key, start, size, crc32 in lists["chunks"]],
        )

    def check_files(self, path: Path) -> None:
        """Raises ValueError naming the first file below `path` that is missing, of another size, or damaged at its
        beginning; and for one that is cut short, the first tensor that it lacks."""
        for name, (size, first, crc32) in self.files.items():
            try:
                found = (path / name).stat().st_size
                with (path / name).open("rb") as file:
                    beginning = file.read(first)
            except OSError as error:
                raise ValueError(f"{path / name} is missing or damaged: {error}") from error
            if found < size:
                raise ValueError(
                    f"{path / name} is truncated: {found} of {size} bytes{self._lost(name, beginning, found)}"
                )
            if found > size or zlib.crc32(beginning) != crc32:
                what = f"{found} bytes, not {size}" if found > size else f"the checksum of its first {first} bytes"
                raise ValueError(f"{path / name} is damaged: {what}")

    def check_chunks(self, path: Path, rank: int, ranks: int, progress: Callable[[int], object] | None = None) -> None:
        """Read this rank's share of all chunks again. Raises ValueError naming the first tensor that is damaged.

        progress: is told how many bytes were read.
        """
        chosen = share(self.digests, rank, ranks)
        for name, mine in groupby(chosen, key=lambda digest: self.tensors[digest.key]):
            try:
                with safe_open(path / name, framework="pt") as file:
                    for digest in mine:
                        numbers = _read(file, digest)
                        if zlib.crc32(bytes_of(numbers.contiguous())) != digest.crc32:
                            where = ", ".join(f"{a}:{a + n}" for a, n in zip(digest.start, digest.size, strict=True))
                            raise ValueError(f"the checksum of {digest.key}[{where}] differs")
                        if progress is not None:
                            progress(numbers.nbytes)
            except (OSError, SafetensorError, ValueError) as error:
                raise ValueError(f"{path / name} is damaged: {error}") from error

    def _lost(self, name: str, beginning: bytes, size: int) -> str:
        """Which tensor of a file that is cut short is the first that is not whole."""
        _, first, crc32 = self.files[name]
        if not name.endswith(".safetensors") or zlib.crc32(beginning) != crc32:
            return ""
        entries = json.loads(beginning[8:])
        entries.pop("__metadata__", None)
        lost = [(e["data_offsets"][1], key) for key, e in entries.items() if first + e["data_offsets"][1] > size]
        return f", {min(lost)[1]} is not whole" if lost else ""


def bytes_of(numbers: Tensor) -> memoryview:
    """The bytes of a tensor in host memory, contiguous; a view."""
    return memoryview(numbers.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def share(digests: Iterable[Digest], rank: int, ranks: int) -> list[Digest]:
    """The rank's part of them: in a row, and of about as many numbers as every other's."""
    ordered = list(digests)
    total = sum(digest.numbers for digest in ordered)
    chosen, before = [], 0
    for digest in ordered:
        if before * ranks // max(total, 1) == rank:
            chosen.append(digest)
        before += digest.numbers
    return chosen


def _read(file: Any, digest: Digest) -> Tensor:
    if not digest.size:
        return file.get_tensor(_name(digest.key))
    index = tuple(slice(a, a + n) for a, n in zip(digest.start, digest.size, strict=True))
    return file.get_slice(_name(digest.key))[index]


def _name(key: str) -> str:
    return key.rpartition("/")[2]
