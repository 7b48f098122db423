"""What a checkpoint or a Hugging Face directory holds: who wrote it, how much of what, and a table of its tensors."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tpformer.checkpoint.layout import natural
from tpformer.checkpoint.reading import DTYPES, Stored, stored_tensors
from tpformer.checkpoint.store import META, OPTIMIZER, read_meta


@dataclass(frozen=True)
class Line:
    """A line of the table: some tensors and what they are of."""

    name: str
    tensors: int
    numbers: int
    dtypes: tuple[str, ...]
    bytes: int
    shape: tuple[int, ...] | None = None  # of one tensor


@dataclass(frozen=True)
class Found:
    """A directory's headers and JSON files; meta is empty where it is no checkpoint of a run."""

    path: Path
    config: dict[str, Any]
    meta: dict[str, Any]
    weights: list[Line]
    optimizer: list[Line]

    @staticmethod
    def open(path: Path) -> "Found":
        """Read headers and JSON files. Raises ValueError naming the file that is missing, damaged or truncated."""
        config = path / "config.json"
        meta = read_meta(path) if (path / META).exists() else {}
        weights = stored_tensors(path)
        optimizer = stored_tensors(path / OPTIMIZER) if (path / OPTIMIZER).is_dir() else {}
        try:
            about = json.loads(config.read_text()) if config.exists() else {}
        except ValueError as error:
            raise ValueError(f"{config} is damaged: {error}") from error
        return Found(path, about, meta, _lines(weights), _lines(optimizer))

    def facts(self) -> Iterator[tuple[str, str]]:
        """Name and value of each line above the table."""
        meta = self.meta
        if self.config:
            yield "model", str(self.config.get("model_type", "without a model_type"))
        if "step" in meta:
            samples = f", {meta['samples']:,} samples of {meta['data']['seq_len']:,} tokens" if "data" in meta else ""
            yield "step", f"{meta['step']:,}{samples}"
        if "layout" in meta:
            yield "written by", ", ".join(f"{axis} {size}" for axis, size in meta["layout"].items())
        if "versions" in meta:
            yield "versions", ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
        yield "parameters", f"{total(self.weights, 'numbers'):,}"
        yield "weights", size(total(self.weights, "bytes"))
        if self.optimizer:
            yield "optimizer", size(total(self.optimizer, "bytes"))


def table(lines: list[Line], every: bool = False) -> str:
    """Tensors for a terminal: by layer, with equal layers in one line; every: one by one, with shapes."""
    rows = [("tensor" if every else "layer", "" if every else "tensors", "parameters", "dtype", "size")]
    for line in lines if every else _folded(_by_layer(lines)):
        shape = " x ".join(map(str, line.shape)) if line.shape is not None else ""
        count = shape if every else f"{line.tensors:,}"
        rows.append((line.name, count, f"{line.numbers:,}", " ".join(line.dtypes), size(line.bytes)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in (0, 3) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def size(count: int) -> str:
    """Bytes for people."""
    unit = next(unit for unit in (30, 20, 10, 0) if count >= 1 << unit or unit == 0)
    return f"{count / (1 << unit):.1f} { {30: 'GiB', 20: 'MiB', 10: 'KiB', 0: 'B'}[unit] }".replace(".0 B", " B")


def total(lines: list[Line], field: str) -> int:
    """The sum of a field."""
    return sum(getattr(line, field) for line in lines)


def _lines(stored: dict[str, Stored]) -> list[Line]:
    lines = []
    for name in sorted(stored, key=natural):
        found = stored[name]
        numbers = math.prod(found.shape)
        itemsize = DTYPES[found.dtype].itemsize if found.dtype in DTYPES else 0
        lines.append(Line(name, 1, numbers, (found.dtype,), numbers * itemsize, found.shape))
    return lines


def _by_layer(lines: list[Line]) -> list[Line]:
    """Tensors whose names are the same up to the first number, and the name of a module where there is none."""
    layers = []
    for name, group in groupby(lines, key=lambda line: _layer(line.name)):
        layers.append(_sum(name, list(group)))
    return layers


def _layer(name: str) -> str:
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name.rpartition(".")[0] or name


def _folded(layers: list[Line]) -> list[Line]:
    """Neighbouring layers that differ by their number only, as one line."""
    folded: list[Line] = []
    for same, group in groupby(layers, key=lambda line: replace(line, name=re.sub(r"\d+$", "", line.name))):
        alike = list(group)
        numbers = [re.search(r"\d*$", line.name) for line in (alike[0], alike[-1])]
        name = f"{same.name}{' to '.join(found[0] for found in numbers if found)}" if len(alike) > 1 else alike[0].name
        folded.append(_sum(name, alike))
    return folded


def _sum(name: str, lines: list[Line]) -> Line:
    dtypes = sorted({dtype for line in lines for dtype in line.dtypes})
    return Line(name, total(lines, "tensors"), total(lines, "numbers"), tuple(dtypes), total(lines, "bytes"))
