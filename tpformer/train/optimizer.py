"""AdamW on fp32 master weights, clipping by the true global norm."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from tpformer.mesh import Mesh
from tpformer.placement import Placement, local_part, placements
from tpformer.train.gradient_norm import gradient_norm
from tpformer.train.nonfinite import first_not_finite
from tpformer.train.optimizer_offload import HostState, Piece
from tpformer.train.precision import LossScaler
from tpformer.train.schedule import OptimizerConfig


class Part(NamedTuple):
    """A parameter, or some of its numbers: what a step of AdamW reads and changes, all on one device."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    gradient: Tensor
    decays: bool


@torch.no_grad()
def adamw_(parts: list[Part], steps: int, lr: float, config: OptimizerConfig) -> None:
    """torch's AdamW (arXiv 1711.05101), in place, after `steps` steps."""
    for decays in (True, False):
        chosen = [part[:4] for part in parts if part.decays == decays]
        if not chosen:
            continue
        weights, averages, squares, gradients = map(list, zip(*chosen, strict=True))
        device = weights[0].device
        fused = device.type in ("cuda", "cpu")
        counts = torch.full((len(weights),), float(steps), device=device if fused else "cpu")
        adamw(
            weights,
            gradients,
            averages,
            squares,
            [],
            list(counts.unbind()),
            fused=fused,
            amsgrad=False,
            beta1=config.betas[0],
            beta2=config.betas[1],
            lr=lr,
            weight_decay=config.weight_decay if decays else 0.0,
            eps=config.eps,
            maximize=False,
        )


class Outcome(NamedTuple):
    """Of a step, the same on every rank: the norm before clipping, the mean loss, whether to stop after it."""

    norm: float
    loss: float
    stop: bool = False
    problem: str = ""
    """Why the step was skipped; of fp16 the loss scale tells."""


Row = tuple[str, slice | None, Tensor, Tensor, Tensor]
"""A parameter's name, which of its numbers (None: all), and these of its weight, exp_avg and exp_avg_sq."""


class Optimizer:
    """AdamW over this rank's part of a model; weight decay on matrices only.

    The weights that it updates are fp32 (fp64 for an fp64 model); `dtype` is what the model then computes in. For
    fp16 it has a `scaler`: the loss is to be multiplied by `loss_scale` before backward.
    offload: the moments, and the weights where the model computes in another dtype, lie in host memory.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        config: OptimizerConfig,
        dtype: torch.dtype | None = None,
        *,
        offload: bool = False,
    ):
        self.config, self.mesh = config, mesh
        self.placements = placements(model, mesh)
        self.steps = 0
        self.skipped = self._skipped_in_a_row = 0  # by on_nonfinite "skip"; the scaler counts its own
        self.scaler = LossScaler() if dtype == torch.float16 else None
        masters: dict[str, Tensor] = {}
        # what FSDP shares out are fp32 masters already: it rounds them to dtype when it gathers them
        if dtype is not None and not any(isinstance(p, DTensor) for p in model.parameters()):
            masters = {name: p.detach().clone() for name, p in model.named_parameters()} if _narrow(dtype) else {}
            model.to(dtype)
        self._weights = {name: local_part(p.detach()) for name, p in model.named_parameters()}
        self._separate = bool(masters)
        self.masters: dict[str, Tensor] = masters or dict(self._weights)
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}  # of what has had a gradient
        self._host: HostState | None = None
        if offload:
            self._to_host()

    @property
    def loss_scale(self) -> float:
        """What the gradients of this step are multiples of; 1 but for fp16."""
        return 1.0 if self.scaler is None else self.scaler.scale

    def step(self, gradients: dict[str, Tensor], lr: float, loss: Tensor, *, stop: bool = False) -> Outcome:
        """Unscale and clip the gradients, in place, and update the weights; collective.

        loss: this replica's, not scaled. stop: this rank asks all to stop after the step. If norm or loss is not
        finite, on every rank the same: with a scaler, which then falls, or on_nonfinite "skip", weights and moments
        stay as they are. Otherwise, or if that cannot go on, raises FloatingPointError before any weight changes.
        """
        scale = self.loss_scale
        norm, mean_loss, stop = gradient_norm(gradients, self.placements, self.mesh, loss, stop)
        norm /= scale
        finite = math.isfinite(norm + mean_loss)
        if self.scaler is not None:
            self.scaler.update(finite)
        if not finite:
            problem = "" if self.scaler else self._problem(gradients, loss, norm, mean_loss)
            return Outcome(norm, mean_loss, stop, problem)
        factor = (self.config.clip_norm / norm if 0 < self.config.clip_norm < norm else 1.0) / scale
        if factor != 1:
            torch._foreach_mul_(list(gradients.values()), factor)
        self._update(gradients, lr)
        self.steps += 1
        self._skipped_in_a_row = 0
        return Outcome(norm, mean_loss, stop)

    def _problem(self, gradients: dict[str, Tensor], loss: Tensor, norm: float, mean_loss: float) -> str:
        """What is not finite, if the step may be skipped for it; otherwise it is raised; collective."""
        found = first_not_finite(gradients, list(self.placements), loss, self.mesh)
        step = self.steps + self.skipped + 1
        problem = f"gradient norm {norm} or loss {mean_loss} is not finite at step {step}: {found}"
        if self.config.on_nonfinite == "stop":
            raise FloatingPointError(problem)
        if self._skipped_in_a_row == self.config.max_skipped:
            raise FloatingPointError(f"{problem}; max_skipped ({self.config.max_skipped}) steps before it were skipped")
        self.skipped += 1
        self._skipped_in_a_row += 1
        return problem

    def state(self) -> dict[str, Tensor]:
        """Everything to save, as parts to be placed like the parameter in the name: weight/, exp_avg/, exp_avg_sq/."""
        if self._host is not None:
            self._host.wait()
        tensors = {f"weight/{name}": master for name, master in self.masters.items()}
        for name, master in self.masters.items():
            moments = self._moments.get(name) or (torch.zeros_like(master), torch.zeros_like(master))
            tensors[f"exp_avg/{name}"], tensors[f"exp_avg_sq/{name}"] = moments
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Take over what `state()` gave, after `steps` steps."""
        if self._host is not None:
            self._host.wait()
        self.steps = steps
        for name, master in self.masters.items():
            master.copy_(tensors[f"weight/{name}"])
            for kind, moment in zip(("exp_avg", "exp_avg_sq"), self._moments_of(name), strict=True):
                moment.copy_(tensors[f"{kind}/{name}"])
            self._publish(name, None, master)

    @torch.no_grad()
    def load_weights(self, fill: Callable[[dict[str, Tensor], dict[str, Placement]], None]) -> None:
        """Have the weights filled, in place, by somebody who knows them; before the first step."""
        if self._host is not None:
            self._host.wait()
        fill(self.masters, self.placements)
        for name, master in self.masters.items():
            self._publish(name, None, master)

    def _moments_of(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._moments:
            zeros = torch.zeros_like if self._host is None else self._host.zeros
            self._moments[name] = zeros(self.masters[name]), zeros(self.masters[name])
        return self._moments[name]

    def _to_host(self) -> None:
        """From now on the moments are there, and the masters if they are not the model's own weights."""
        dtypes = {master.dtype for master in self.masters.values()}
        if len(dtypes) > 1:
            raise ValueError(f"offload needs weights of one dtype, not {', '.join(sorted(map(str, dtypes)))}")
        device = next(iter(self._weights.values())).device
        self._host = HostState(device, dtypes.pop(), 3 if self._separate else 2)
        if self._separate:
            self.masters = {name: self._host.zeros(master).copy_(master) for name, master in self.masters.items()}

    def _update(self, gradients: dict[str, Tensor], lr: float) -> None:
        """AdamW on everything that has a gradient; what has none is frozen."""
        moments = {name: self._moments_of(name) for name in gradients}
        if self._host is None:
            self._apply([(name, None, self.masters[name], *both) for name, both in moments.items()], gradients, lr)
        elif self._separate:
            state = {name: (self.masters[name], *both) for name, both in moments.items()}
            self._host.run(
                state, lambda chunk: self._apply([(n, i, x[0], x[1], x[2]) for n, i, x in chunk], gradients, lr)
            )
        else:

            def update(chunk: list[Piece]) -> None:
                self._apply([(n, i, _numbers(self.masters[n], i), x[0], x[1]) for n, i, x in chunk], gradients, lr)

            self._host.run(moments, update)

    def _apply(self, rows: list[Row], gradients: dict[str, Tensor], lr: float) -> None:
        adamw_(
            [
                Part(weight, average, square, _numbers(gradients[name], part), self.masters[name].dim() >= 2)
                for name, part, weight, average, square in rows
            ],
            self.steps,
            lr,
            self.config,
        )
        for name, part, weight, *_ in rows:
            self._publish(name, part, weight)

    @torch.no_grad()
    def _publish(self, name: str, part: slice | None, master: Tensor) -> None:
        """Round fp32 weights into the model, where it computes in another dtype."""
        if self._separate:
            _numbers(self._weights[name], part).copy_(master, non_blocking=True)


def _numbers(x: Tensor, part: slice | None) -> Tensor:
    """Some of its numbers, or all of it; a view."""
    return x if part is None else x.view(-1)[part]


def _narrow(dtype: torch.dtype | None) -> bool:
    return dtype in (torch.bfloat16, torch.float16)
