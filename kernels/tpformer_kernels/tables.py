"""How each kernel is launched on each kind of GPU: block sizes and warps, from a file, the same on every rank.

A timing at run time would choose differently on each rank and in each run, and with the choice the order of
summation. `python -m benchmarks.tune` measures on a device and writes its file.
"""

import json
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

import torch

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities with a table of their own; other devices use the next lower one's, but see architecture_of."""

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graph(function: Function) -> Function:
    """torch.compiler.assume_constant_result: torch.compile calls it, and does not look into the file that it reads.

    That one imports the whole compiler, a second of every import, and sets TORCHINDUCTOR_CACHE_DIR.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@cache
def table(architecture: int) -> dict[str, Any]:
    """The file of one architecture: for each kernel a list of rows, by ascending `up_to`."""
    return json.loads(files("tpformer_kernels").joinpath(f"tables/sm_{architecture}.json").read_text(encoding="utf-8"))


@cache
def architecture_of(device: torch.device) -> int:
    """The table that serves a device; CPU tensors (Triton's interpreter) take the first.

    So does sm_120, which has neither the tensor cores nor the shared memory of sm_100.
    """
    if device.type != "cuda":
        return ARCHITECTURES[0]
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 12:
        return ARCHITECTURES[0]
    return max((a for a in ARCHITECTURES if a <= 10 * major + minor), default=ARCHITECTURES[0])


def options(kernel: str, size: int, device: torch.device) -> dict[str, int]:
    """Launch options of a kernel for rows of `size` numbers: its constexpr block sizes and num_warps."""
    rows = table(architecture_of(device))["kernels"][kernel]
    row = next(row for row in rows if row["up_to"] is None or size <= row["up_to"])
    return {name: value for name, value in row.items() if name != "up_to"}
