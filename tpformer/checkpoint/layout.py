"""Which file of a checkpoint has which tensor, and where in it: the same for every layout that writes it.

A safetensors file is the header's length (8 bytes), the header (JSON), and the numbers
(huggingface.co/docs/safetensors).
"""

import json
import math
import re
from dataclasses import dataclass

import torch

MAX_FILE_BYTES = 4 << 30
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Whole:
    """A whole tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """What its numbers take."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.shape} of {self.dtype}"


@dataclass(frozen=True)
class File:
    """One file: its name in the checkpoint, its first bytes, and where each tensor's numbers begin, by key."""

    name: str
    header: bytes
    offsets: dict[str, int]
    bytes: int


def natural(name: str) -> list[tuple[int, int | str]]:
    """To sort names by: layer 2 before layer 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def arrange(wholes: dict[str, Whole], max_bytes: int = MAX_FILE_BYTES) -> list[File]:
    """Whole tensors in files of at most max_bytes of them, in the order of their names with numbers as numbers.

    wholes: by key, whose last part after "/" is the tensor's name in its file, and the rest the folder.
    Raises ValueError for a dtype that such files do not have.
    """
    folders: dict[str, list[str]] = {}
    for key in sorted(wholes, key=natural):
        if wholes[key].dtype not in DTYPES:
            raise ValueError(f"{key} is {wholes[key].dtype}; a checkpoint has {', '.join(map(str, DTYPES))}")
        folders.setdefault(key.rpartition("/")[0], []).append(key)
    files = []
    for folder, keys in folders.items():
        groups = _groups(keys, wholes, max_bytes)
        for number, group in enumerate(groups, 1):
            stem = f"model-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else "model"
            files.append(_file(f"{folder}/{stem}.safetensors".lstrip("/"), group, wholes))
    return files


def index_of(files: list[File], folder: str) -> dict[str, object] | None:
    """The index of a folder's files, as transformers writes it; None where there is but one."""
    inside = [file for file in files if file.name.rpartition("/")[0] == folder]
    if len(inside) < 2:
        return None
    weight_map = {
        key.rpartition("/")[2]: file.name.rpartition("/")[2] for file in inside for key in sorted(file.offsets)
    }
    total = sum(file.bytes - len(file.header) for file in inside)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _groups(keys: list[str], wholes: dict[str, Whole], max_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = []
    room = 0
    for key in keys:
        if not groups or wholes[key].bytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(key)
        room -= wholes[key].bytes
    return groups


def _file(name: str, keys: list[str], wholes: dict[str, Whole]) -> File:
    """Wide numbers first, so that all are aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for key in sorted(keys, key=lambda key: -wholes[key].dtype.itemsize):
        whole = wholes[key]
        begins[key], end = end, end + whole.bytes
        entries[key.rpartition("/")[2]] = {
            "dtype": DTYPES[whole.dtype],
            "shape": list(whole.shape),
            "data_offsets": [begins[key], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return File(name, header, {key: len(header) + begin for key, begin in begins.items()}, len(header) + end)
