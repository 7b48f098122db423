"""The norm of the whole model's gradient: the one all-reduce of a step that every rank takes part in."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tpformer.collectives import all_reduce_
from tpformer.mesh import Mesh
from tpformer.placement import Placement


class StepSums(NamedTuple):
    """What every rank knows after it, the same everywhere."""

    norm: float
    loss: float
    """Mean over the replicas."""
    stop: bool
    """Some rank asked to stop after this step."""


def gradient_norm(
    gradients: dict[str, Tensor], known: dict[str, Placement], mesh: Mesh, loss: Tensor, stop: bool = False
) -> StepSums:
    """The L2 norm of the whole model's gradient, the mean over the replicas of `loss`, and whether any rank said stop.

    One all-reduce of three numbers: a stop rides along, so that it is heard by all ranks at the same step for nothing.
    Every element counts once: copies on one tp rank only, replicas on one dp rank, tied weights on one
    stage. But one that is not finite, on whichever rank, makes the norm so on every rank.
    """
    counted: list[Tensor] = []
    others: list[Tensor] = []
    for name in gradients:
        for piece, _, ours in known[name].slices():
            (counted if piece.copy == 0 and known[name].counts else others).append(gradients[name][ours])
    sums = torch.zeros(3, dtype=torch.float64, device=loss.device)
    if counted:
        sums[0] = _squares(counted)
    if others:
        sums[0] += 0 * _squares(others)  # nothing, or nan
    sums[1] = loss.detach().double() / (mesh.dp.size * mesh.tp.size)
    if stop:
        sums[2] = 1
    squares, mean_loss, stops = all_reduce_(sums, mesh.world).tolist()
    return StepSums(math.sqrt(squares), mean_loss, stops > 0)


def _squares(tensors: list[Tensor]) -> Tensor:
    """The sum of all their squares, fp64."""
    return torch.stack([norm.double() for norm in torch._foreach_norm(tensors)]).square().sum()
