"""What the scripts that tune share: they need a GPU, to write one with a table of its own, and leave no half a file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from tpformer_kernels import tables


def require_device(parser: argparse.ArgumentParser, write: bool) -> None:
    """Exits with a message where nothing can be measured, or written."""
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here, and only on one can anything be timed")
    major, minor = torch.cuda.get_device_capability()
    if write and 10 * major + minor not in tables.ARCHITECTURES:
        known = ", ".join(f"sm_{architecture}" for architecture in tables.ARCHITECTURES)
        parser.error(f"this device is sm_{major}{minor}, without a table of its own (there are {known}): no --write")


def write_whole(path: Path, text: str) -> None:
    """Write it whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
