"""What `compile_only` compiles of matmul: every tile of every table, in each layout and each way to read it."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tpformer_kernels import matmul_choice, matmul_ops, tables

OPS: Any = torch.ops.tpformer
DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
ACTIVATIONS = {"silu gate": 0, "gelu gate": 1, "tanh gate": 2, "gelu": 3, "tanh": 4}
EVERY_TILE = [("nt", "gelu"), ("nn", "residual"), ("tn", "accumulate")]
"""Layouts and epilogues as a model has them, with the most registers."""
ONCE = [("nt", "plain"), ("nn", "plain"), ("tn", "plain"), ("tt", "first")]
ONCE += [("nt", name) for name in ACTIVATIONS if name != "gelu"]


def matrix(rows: int, columns: int, dtype: torch.dtype, turned: bool, padding: int) -> Tensor:
    """Of a layout; rows that are not a multiple of 16 bytes apart cannot be read by descriptors."""
    if turned:
        return matrix(columns, rows, dtype, False, padding).t()
    return torch.empty(rows, columns + padding, dtype=dtype)[:, :columns]


def matmul(rows: int, size: int, dtype: torch.dtype, family: str, tile: str, layout: str, epilogue: str) -> None:
    """(rows, size) times (size, size) in one tile; family: the numbers, and how they are read."""
    numbers, loads = family.split()
    architecture = tables.architecture_of(torch.device("cpu"))
    padding = 0 if loads == matmul_choice.best_loads(architecture, numbers) else 1
    tf32 = numbers == "tf32"
    a = matrix(rows, size, dtype, layout[0] == "t", padding)
    b = matrix(size, size, dtype, layout[1] == "t", padding)
    choice = matmul_choice.choose(
        "nn plain", rows, size, size, dtype, a.device, fit=matmul_choice.descriptors_fit(a, b), tf32=tf32
    )
    if choice.loads != loads:
        raise ValueError(f"{layout} would not be read by {loads}")
    choice = choice._replace(tile=tile, options=matmul_choice.table(architecture)["tiles"][family][tile])
    with patch.object(matmul_ops, "choose", lambda *shape, **how: choice):
        run(a, b, epilogue, tf32)


def run(a: Tensor, b: Tensor, epilogue: str, tf32: bool) -> None:
    """One operator."""
    bias, residual = b.new_empty(b.shape[1]), a.new_empty(a.shape[0], b.shape[1])
    if epilogue in ACTIVATIONS:
        OPS.matmul_activated(a, b, bias, ACTIVATIONS[epilogue], tf32)
    elif epilogue in ("accumulate", "first"):
        OPS.matmul_accumulate_(residual.float(), a.t(), b, epilogue == "first")
    else:
        OPS.matmul_forward(
            a, b, bias if epilogue == "residual" else None, residual if epilogue == "residual" else None, tf32
        )


def launches(architecture: int, numbers: str) -> Iterator[tuple[int, int, torch.dtype, dict[str, Any]]]:
    """Rows, size, dtype and flags of each call: each tile in three layouts, each other epilogue in the first tile."""
    families = matmul_choice.table(architecture)["tiles"]
    dtype = DTYPES[numbers]
    for family, tiles in families.items():
        if family.split()[0] == numbers:
            first = next(iter(tiles))
            for tile in tiles:
                for layout, epilogue in EVERY_TILE:
                    if numbers != "tf32" or epilogue != "accumulate":  # whose products are exact
                        yield 64, 128, dtype, {"family": family, "tile": tile, "layout": layout, "epilogue": epilogue}
            place = tables.ARCHITECTURES.index(architecture)
            once = [(64, 128, dtype, pair) for pair in ONCE if numbers != "tf32" or pair[1] != "first"]
            if family == "half pointers":
                once += [(64, 128, torch.float16, ("nt", "residual")), (1, 127, dtype, ("nn", "residual"))]
            for rows, size, kind, (layout, epilogue) in once[place::3]:
                yield rows, size, kind, {"family": family, "tile": first, "layout": layout, "epilogue": epilogue}
