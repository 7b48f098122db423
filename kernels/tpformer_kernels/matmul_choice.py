"""Which implementation of a matmul `auto` takes, and how the kernel is launched: from a file, the same on every rank.

tables/matmul_sm_*.json has the tiles that compile well on an architecture, and a row for each matmul of known models:
the tile, and how many times as fast as torch's matmul (with the op that would follow it) the kernel was measured to
be. What was not measured is torch's. `python -m benchmarks.tune_matmul` fills the rows in.
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tpformer_kernels import tables

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Of A100, H100 and H200, B200: what the derived choice of tiles counts on, on every rank the same."""
INTERPRETED_PROGRAMS = 4
ALIGNMENT = 16
"""Bytes that divide the start and the rows of what the copy engine reads (CUDA, cuTensorMapEncodeTiled)."""


class Choice(NamedTuple):
    """What a matmul comes to."""

    backend: Literal["triton", "torch"]
    """What `auto` takes."""
    loads: Literal["descriptors", "pointers"]
    """How the kernel reads, whoever asks for it."""
    tile: str
    options: dict[str, int]
    """Its launch options."""
    speedup: float | None
    """Of the kernel over torch, as it was measured; None where it was not."""


def choose(
    kind: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, *, fit: bool = True, tf32: bool = False
) -> Choice:
    """For a (m, k) times b (k, n).

    kind: layout and epilogue, as in "nt gated"; the epilogue is plain, bias, residual, gelu, gated or accumulate.
    fit: whether descriptors can read both matrices.
    """
    architecture = tables.architecture_of(device)
    read = table(architecture)
    numbers = "half" if dtype != torch.float32 else "tf32" if tf32 else "ieee"
    best = best_loads(architecture, numbers)
    loads = best if fit else "pointers"
    tiles = read["tiles"][f"{numbers} {loads}"]
    row = read["shapes"].get(key_of(kind, m, n, k)) if numbers == "half" and loads == best else None
    if row is None:
        tile = derived_tile(tiles, m, n, MULTIPROCESSORS[architecture])
        return Choice("torch", loads, tile, tiles[tile], None)
    speedup = row["speedup"]
    faster = speedup is not None and speedup > 1
    return Choice("triton" if faster else "torch", loads, row["tile"], tiles[row["tile"]], speedup)


def faster_by_kernel(a: Tensor, b: Tensor, epilogue: str, tf32: bool) -> bool:
    """Whether `auto` takes the kernel for two matrices as they lie in memory."""
    kind = kind_of(a, b, epilogue)
    m, k = rounded(kind, *a.shape)
    return faster(kind, m, b.shape[1], k, a.dtype, a.device, descriptors_fit(a, b), tf32)


@tables.constant_in_graph
def faster(
    kind: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, fit: bool = True, tf32: bool = False
) -> bool:
    """The same for a shape, of which `rounded` numbers are enough; torch.compile cannot look into a file."""
    return choose(kind, m, n, k, dtype, device, fit=fit, tf32=tf32).backend == "triton"


@cache
def table(architecture: int) -> dict[str, Any]:
    """The file of one architecture: `tiles` by how numbers are multiplied and read, `shapes` by key_of."""
    name = f"tables/matmul_sm_{architecture}.json"
    return json.loads(files("tpformer_kernels").joinpath(name).read_text(encoding="utf-8"))


def key_of(kind: str, m: int, n: int, k: int) -> str:
    """The name of a row."""
    m, k = rounded(kind, m, k)
    return f"{kind} {m}x{n}x{k}"


def rounded(kind: str, m: int, k: int) -> tuple[int, int]:
    """m and k; the number of tokens, k of a weight's gradient and else m, becomes the next power of two."""
    return (m, next_power_of_two(k)) if kind.startswith("tn") else (next_power_of_two(m), k)


def next_power_of_two(x: int) -> int:
    """By comparisons: torch.compile guards on these, so that a new number compiles anew only for a new power."""
    power = 1
    while power < x:
        power *= 2
    return power


def derived_tile(tiles: dict[str, dict[str, int]], m: int, n: int, multiprocessors: int) -> str:
    """The tile of least time: waves of tiles, times their area, times what they read for each product.

    For BLOCK_M · BLOCK_N products a tile reads BLOCK_M + BLOCK_N numbers, each taken to cost as much as 32 products.
    """

    def time(name: str) -> float:
        rows, columns = tiles[name]["BLOCK_M"], tiles[name]["BLOCK_N"]
        waves = -(-(-(-m // rows) * -(-n // columns)) // multiprocessors)
        return waves * (rows * columns + 32 * (rows + columns))

    return min(tiles, key=time)


def kind_of(a: Tensor, b: Tensor, epilogue: str) -> str:
    """Layout and epilogue: t for a matrix whose columns are contiguous, as weights are in x wᵀ."""
    return "".join("t" if _turned(x) else "n" for x in (a, b)) + f" {epilogue}"


def _turned(x: Tensor) -> bool:
    return x.stride(1) != 1 and x.stride(0) == 1


def best_loads(architecture: int, numbers: str) -> Literal["descriptors", "pointers"]:
    """How tiles are read where the matrices allow it."""
    return "descriptors" if f"{numbers} descriptors" in table(architecture)["tiles"] else "pointers"


def descriptors_fit(a: Tensor, b: Tensor) -> bool:
    """Whether the copy engine can read both: not empty, rows or columns contiguous, and those aligned.

    Where they start is not asked: torch.compile does not know it. The launch does, and takes pointers if it must.
    """
    return all(_fits(x) for x in (a, b))


def _fits(x: Tensor) -> bool:
    x = x.t() if _turned(x) else x
    (rows, columns), size = x.shape, x.element_size()
    contiguous = x.stride(1) == 1 and x.stride(0) >= columns
    return rows > 0 and columns > 0 and contiguous and x.stride(0) * size % ALIGNMENT == 0


@cache
def programs(device: torch.device) -> int:
    """How many programs run together: one on each multiprocessor."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count
