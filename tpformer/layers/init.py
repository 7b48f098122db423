"""Drawing initial weights: each rank draws its own part of a parameter, bit for bit the same at any tp."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tpformer.placement import Placement
from tpformer.random import Key, normal, uniform
from tpformer_kernels import random_columns

CHUNK = 1 << 20
"""How many numbers are drawn at a time: bounds the working memory (about 100 bytes a number)."""


def draw(local: Tensor, placement: Placement, key: Key, distribution: Callable[[Tensor], Tensor]) -> None:
    """Fill this rank's part of a vector or matrix with numbers that depend on their global index only.

    distribution: maps random 32-bit words to fp64 numbers. Padding becomes zero. The whole is never made.
    """
    with torch.no_grad():
        local.zero_()
        for _, theirs, ours in placement.slices():
            view = local[ours] if local.dim() == 2 else local[ours].unsqueeze(0)
            starts = [index.start or 0 for index in theirs]
            first_row, first_column = [*starts, 0][:2] if local.dim() == 2 else (0, starts[0])
            for rows in range(0, view.shape[0], step := max(1, CHUNK // view.shape[1])):
                part = view[rows : rows + step]
                index = torch.arange(first_row + rows, first_row + rows + part.shape[0], device=local.device)
                zero = torch.zeros_like(index)
                words = random_columns(key.seed, (index, zero, zero), first_column, first_column + view.shape[1])
                part.copy_(distribution(words))


def draw_normal(local: Tensor, placement: Placement, key: Key, std: float) -> None:
    """Fill this rank's part with N(0, std²)."""
    draw(local, placement, key, lambda words: normal(words) * std)


def draw_uniform(layer: nn.Module, placements: dict[str, Placement], bound: float) -> None:
    """Fill a new layer's own parameters from U(-bound, bound), as torch.nn's layers do.

    Takes one number a parameter from torch's generator, whatever the layout: ranks with the same
    torch.manual_seed (also with none) get parts of the same weights. A layer on the meta device is left as it is.
    """
    for name, parameter in layer.named_parameters(recurse=False):
        if not parameter.is_meta:
            draw(parameter, placements[name], fresh_key(), lambda words: (2 * uniform(words) - 1) * bound)


def fresh_key() -> Key:
    """A key from torch's generator."""
    return Key(int(torch.randint(2**62, ())))
