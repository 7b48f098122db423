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

EPILOGUES = ("plain", "bias", "residual", "gelu", "gated", "accumulate")
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Of A100, H100 and H200, B200: what the derived choice of tiles counts on, on every rank the same."""
INTERPRETED_PROGRAMS = 4
ALIGNMENT = 16
"""Bytes that divide the start and the rows of what the copy engine reads (CUDA, cuTensorMapEncodeTiled)."""


class Choice(NamedTuple):
    """What a matmul comes to."""

    backend: Literal["triton", "torch"]
    """What `auto` takes."""
    tile: str
    options: dict[str, int]
    """Launch options of the kernel, whoever asks for it."""
    speedup: float | None
    """Of the kernel over torch, as it was measured; None where it was not."""


def choose(
    kind: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, *, loads: str = "", tf32: bool = False
) -> Choice:
    """For a (m, k) times b (k, n). kind: layout and epilogue, "nt gated" (kind_of finds it).

    loads: "descriptors" or "pointers"; without it the better that the architecture has.
    """
    architecture = tables.architecture_of(device)
    read = table(architecture)
    numbers = "half" if dtype != torch.float32 else "tf32" if tf32 else "ieee"
    best = best_loads(architecture, numbers)
    tiles = read["tiles"][f"{numbers} {loads or best}"]
    row = read["shapes"].get(key_of(kind, m, n, k)) if numbers == "half" and loads in ("", best) else None
    if row is None:
        tile = derived_tile(tiles, m, n, MULTIPROCESSORS[architecture])
        return Choice("torch", tile, tiles[tile], None)
    speedup = row["speedup"]
    faster = speedup is not None and speedup > 1
    return Choice("triton" if faster else "torch", row["tile"], tiles[row["tile"]], speedup)


def choose_for(a: Tensor, b: Tensor, epilogue: str, tf32: bool) -> Choice:
    """The choice for two matrices as they lie in memory."""
    (m, k), n = a.shape, b.shape[1]
    loads = loads_of(a, b, tf32)
    return choose(kind_of(a, b, epilogue), m, n, k, a.dtype, a.device, loads=loads, tf32=tf32)


def explain(kind: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> str:
    """One line for people: what `auto` takes, and why."""
    choice = choose(kind, m, n, k, dtype, device)
    if choice.speedup is not None:
        return (
            f"{choice.backend}: in tile {choice.tile} the kernel was measured {choice.speedup:.3f} x as fast as torch"
        )
    known = dtype != torch.float32 and key_of(kind, m, n, k) in table(tables.architecture_of(device))["shapes"]
    why = "its row was not measured yet" if known else "the table has no row for it"
    return f"torch: {why} (the kernel would run in tile {choice.tile})"


@cache
def table(architecture: int) -> dict[str, Any]:
    """The file of one architecture: `tiles` by how numbers are multiplied and read, `shapes` by key_of."""
    name = f"tables/matmul_sm_{architecture}.json"
    return json.loads(files("tpformer_kernels").joinpath(name).read_text(encoding="utf-8"))


def key_of(kind: str, m: int, n: int, k: int) -> str:
    """The name of a row; the number of tokens, k of a weight's gradient and else m, counts as the next power of two."""
    if kind.startswith("tn"):
        k = next_power_of_two(k)
    else:
        m = next_power_of_two(m)
    return f"{kind} {m}x{n}x{k}"


def next_power_of_two(x: int) -> int:
    return 1 << max(0, x - 1).bit_length()


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


def best_loads(architecture: int, numbers: str) -> str:
    """How tiles are read where the matrices allow it."""
    return "descriptors" if f"{numbers} descriptors" in table(architecture)["tiles"] else "pointers"


def loads_of(a: Tensor, b: Tensor, tf32: bool) -> str:
    """Descriptors where the device has them and both matrices fit: aligned, rows or columns contiguous, not empty."""
    numbers = "half" if a.dtype != torch.float32 else "tf32" if tf32 else "ieee"
    fit = all(_fits(x) for x in (a, b))
    return best_loads(tables.architecture_of(a.device), numbers) if fit else "pointers"


def _fits(x: Tensor) -> bool:
    x = x.t() if _turned(x) else x
    (rows, columns), size = x.shape, x.element_size()
    contiguous = x.stride(1) == 1 and x.stride(0) >= columns
    aligned = x.storage_offset() * size % ALIGNMENT == 0 and x.stride(0) * size % ALIGNMENT == 0
    return rows > 0 and columns > 0 and contiguous and aligned


@cache
def programs(device: torch.device) -> int:
    """How many programs run together: one on each multiprocessor."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count
