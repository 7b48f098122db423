"""One optimizer step; loss.backward() is here."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpformer.mesh import Mesh
from tpformer.parallel.data import GradientBuckets
from tpformer.parallel.fsdp import ShardedGradients
from tpformer.parallel.pipeline import Pipeline
from tpformer.random import Key
from tpformer.train.optimizer import Optimizer


@dataclass(frozen=True)
class StepReport:
    """What a step did: the mean loss of the whole batch in nats per token, and the gradient norm before clipping."""

    loss: float
    grad_norm: float


def train_step(
    model: Any,
    buckets: GradientBuckets | ShardedGradients,
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
    samples = samples.to(mesh.device, non_blocking=True)
    place = None if key is None else Key(key.seed, mesh.dp.rank * len(samples))
    scale = 1 / mesh.dp.size
    if isinstance(model, Pipeline):
        total = model.backward(samples, key=place, z_loss=z_loss, scale=scale)
    else:
        total = torch.zeros((), device=mesh.device)
        for first in range(0, len(samples), micro_batch_size):
            part = samples[first : first + micro_batch_size]
            share = len(part) / len(samples)
            here = None if place is None else Key(place.seed, place.sample + first)
            loss = model.loss(part[:, :-1], part[:, 1:], key=here, z_loss=z_loss) * share
            buckets.start(last=first + len(part) == len(samples))
            (loss * scale).backward()
            total = total + loss.detach()
    gradients = buckets.finish()
    if isinstance(model, Pipeline):
        model.sum_tied(gradients)
    norm, mean_loss = optimizer.step(gradients, lr, total)
    return StepReport(mean_loss, norm)
