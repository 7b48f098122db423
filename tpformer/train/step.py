"""One optimizer step; loss.backward() is here."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpformer.mesh import Mesh
from tpformer.parallel.data import GradientBuckets
from tpformer.random import Key
from tpformer.train.optimizer import Optimizer


@dataclass(frozen=True)
class StepReport:
    """What a step did: the mean loss of the whole batch in nats per token, and the gradient norm before clipping."""

    loss: float
    grad_norm: float
    loss_scale: float = 1.0
    """Of this step's backward; neither number above is a multiple of it."""
    skipped: bool = False
    """A number was not finite: no weight changed, and the next step's scale is smaller."""


def train_step(
    model: Any,
    buckets: GradientBuckets,
    optimizer: Optimizer,
    samples: Tensor,
    *,
    micro_batch_size: int,
    lr: float,
    key: Key | None = None,
    z_loss: float = 0.0,
) -> StepReport:
    """One step on this replica's samples, int64 (n, s + 1), in micro-batches; collective.

    key: of this step's dropout. Every tp rank of a replica passes the same samples, each replica its own.
    """
    mesh: Mesh = model.mesh
    scale, steps = optimizer.loss_scale, optimizer.steps
    parts = samples.to(mesh.device, non_blocking=True).split(micro_batch_size)
    total = torch.zeros((), device=mesh.device)
    for number, part in enumerate(parts):
        place = None if key is None else Key(key.seed, mesh.dp.rank * len(samples) + number * micro_batch_size)
        share = len(part) / len(samples)
        loss = model.loss(part[:, :-1], part[:, 1:], key=place, z_loss=z_loss) * share
        buckets.start(last=number == len(parts) - 1)
        (loss * scale / mesh.dp.size).backward()
        total = total + loss.detach()
    norm, mean_loss = optimizer.step(buckets.finish(), lr, total)
    return StepReport(mean_loss, norm, scale, skipped=optimizer.steps == steps)
