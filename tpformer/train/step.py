"""One optimizer step; loss.backward() is here."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tpformer.mesh import Mesh
from tpformer.parallel.data import GradientBuckets
from tpformer.parallel.fsdp import ShardedGradients
from tpformer.parallel.pipeline import Pipeline
from tpformer.parallel.timeline import Timeline, record
from tpformer.random import Key
from tpformer.train.nonfinite import first_output
from tpformer.train.optimizer import Optimizer, Outcome


@dataclass(frozen=True)
class StepOptions:
    """What a step is told."""

    micro_batch_size: int
    """Samples in one forward and backward; a pipeline has its own."""
    lr: float
    key: Key | None = None
    """Of this step's dropout; none without."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser in the loss."""
    timeline: Timeline | None = None
    """Where to record what was done when."""
    stop: bool = False
    """This rank was asked to stop: all are to hear of it."""


@dataclass(frozen=True)
class StepReport:
    """What a step did: the mean loss of the whole batch in nats per token, and the gradient norm before clipping."""

    loss: float
    grad_norm: float
    loss_scale: float = 1.0
    """Of this step's backward; neither number above is a multiple of it."""
    skipped: bool = False
    """A number was not finite: no weight changed and, for fp16, the next step's scale is smaller."""
    problem: str = ""
    """Which number, but for fp16."""
    stop: bool = False
    """Some rank was asked to stop; the same on every rank."""


def train_step(
    model: Any,
    gradients: GradientBuckets | ShardedGradients,
    optimizer: Optimizer,
    samples: Tensor,
    options: StepOptions,
) -> StepReport:
    """One step on this replica's samples, int64 (n, s + 1), in micro-batches; collective.

    Every tp and pp rank of a replica passes the same samples, each replica its own.
    """
    mesh: Mesh = model.mesh
    loss_scale, steps = optimizer.loss_scale, optimizer.steps
    scale = loss_scale / mesh.dp.size
    samples = samples.to(mesh.device, non_blocking=True)
    key = options.key and Key(options.key.seed, mesh.dp.rank * len(samples))
    if isinstance(model, Pipeline):
        total = model.backward(samples, key=key, z_loss=options.z_loss, scale=scale, timeline=options.timeline)
    else:
        total = torch.zeros((), device=mesh.device)
        for number, part in enumerate(samples.split(options.micro_batch_size)):
            first = number * options.micro_batch_size
            here = key and Key(key.seed, key.sample + first)
            with record(options.timeline, "forward", 0, number):
                loss = model.loss(part[:, :-1], part[:, 1:], key=here, z_loss=options.z_loss)
                loss = loss * (len(part) / len(samples))
            gradients.start(last=first + len(part) == len(samples))
            with record(options.timeline, "backward", 0, number):
                (loss * scale).backward()
            total = total + loss.detach()
    look = partial(first_output, model, samples, options.micro_batch_size, key)
    with record(options.timeline, "optimizer"):
        found = gradients.finish()
        if isinstance(model, Pipeline):
            model.sum_tied(found)
        norm, mean_loss, stop, problem = _update(optimizer, found, options, total, look)
    return StepReport(mean_loss, norm, loss_scale, optimizer.steps == steps, problem, stop)


def _update(
    optimizer: Optimizer, found: dict[str, Tensor], options: StepOptions, loss: Tensor, look: Callable[[], str]
) -> Outcome:
    """The optimizer's step; if the loss is not finite, what it says of that has what `look` finds at its end."""
    try:
        outcome = optimizer.step(found, options.lr, loss, stop=options.stop)
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}{look()}") from error
    seen = look() if outcome.problem and not math.isfinite(outcome.loss) else ""
    return outcome._replace(problem=outcome.problem + seen)
