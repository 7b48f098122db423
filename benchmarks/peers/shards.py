"""The plain model's weights in peers that have other names for them, and hold a rank's parts as plain tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

CUT_DIM = {  # of the plain model's modules and tpformer's fused ones; the norms are whole on every rank
    **dict.fromkeys(("embedding", "q", "k", "v", "qkv", "gate", "up", "gate_up", "head"), 0),
    **dict.fromkeys(("out", "down"), 1),
}
Rename = Callable[[str], str]
"""The plain model's name of a weight -> the peer's."""


def renamed(name: str, modules: dict[str, str], layers: str) -> str:
    """A weight's name where modules have other names, e.g. "blocks.0.attention.q.weight" -> "layers.0.wq.weight"."""
    layer, module = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.weight", name).groups()  # type: ignore[union-attr]
    return f"{f'{layers}.{layer}.' if layer else ''}{modules[module]}.weight"


def cut_dim(name: str) -> int | None:
    """The dimension in which tensor parallelism cuts this weight; None if every rank has all of it."""
    return CUT_DIM.get(name.split(".")[-2])


def load(model: nn.Module, state: dict[str, Tensor], rename: Rename) -> None:
    """Copy this rank's part of every whole weight into `model`; raises AttributeError if names differ."""
    rank, degree = dist.get_rank(), dist.get_world_size()
    for name, whole in state.items():
        dim, parameter = cut_dim(name), model.get_parameter(rename(name))
        mine = whole if dim is None else whole.chunk(degree, dim)[rank]
        if parameter.shape != mine.shape:  # copy_ would broadcast
            raise ValueError(f"{rename(name)} is {tuple(parameter.shape)}, and {name} {tuple(mine.shape)}")
        parameter.data.copy_(mine)


def whole_gradients(model: nn.Module, names: Iterable[str], rename: Rename) -> dict[str, Tensor]:
    """Every gradient under these names, put together from all ranks' parts; collective."""
    full = {}
    for name in names:
        gradient, dim = model.get_parameter(rename(name)).grad, cut_dim(name)
        if gradient is None:
            raise RuntimeError(f"no gradient was left in {rename(name)}")
        parts = [
            torch.empty_like(gradient, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())
        ]
        if dim is not None:
            dist.all_gather(parts, gradient.contiguous())
        full[name] = gradient if dim is None else torch.cat(parts, dim)
    return full
