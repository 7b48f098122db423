"""AdamW on fp32 master weights, clipping by the true global norm, and the learning-rate schedules."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tpformer.collectives import all_reduce_
from tpformer.mesh import Mesh
from tpformer.placement import Placement, local_part, placements


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) and its learning rate over time.

    Raises ValueError for values out of range.
    """

    lr: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "linear", "constant", "noam"] = "cosine"
    """After the warm-up: cosine or linear decay to the end; wsd: constant, then a linear decay at the end
    (arXiv 2405.18392); constant; noam: 1/sqrt(step) (arXiv 1706.03762)."""
    warmup_steps: int = 0
    """Steps of linear warm-up to the peak."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end, as a part of the peak (cosine, wsd, linear)."""
    decay_fraction: float = 0.2
    """Part of all steps in which wsd decays."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's two moments."""
    eps: float = 1e-8
    """Added to Adam's denominator."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        ranges = {
            "lr": self.lr > 0,
            "schedule": self.schedule in ("cosine", "wsd", "linear", "constant", "noam"),
            "warmup_steps": self.warmup_steps >= 0,
            "min_lr_ratio": 0 <= self.min_lr_ratio <= 1,
            "decay_fraction": 0 <= self.decay_fraction <= 1,
            "betas": all(0 <= beta < 1 for beta in self.betas),
            "eps": self.eps > 0,
            "weight_decay": self.weight_decay >= 0,
            "clip_norm": self.clip_norm >= 0,
        }
        for name, fine in ranges.items():
            if not fine:
                raise ValueError(f"{name} ({getattr(self, name)}) is out of range")


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step 0..total_steps - 1."""
    c = config
    if c.schedule == "noam":
        warm = max(1, c.warmup_steps)
        return c.lr * min((step + 1) / warm, math.sqrt(warm / (step + 1)))
    if step < c.warmup_steps:
        return c.lr * (step + 1) / c.warmup_steps
    if c.schedule == "constant":
        return c.lr
    start = c.warmup_steps if c.schedule != "wsd" else max(c.warmup_steps, round(total_steps * (1 - c.decay_fraction)))
    progress = min(1.0, max(0, step - start) / max(1, total_steps - start))
    if c.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return c.lr * (1 - (1 - c.min_lr_ratio) * progress)


def gradient_norm(
    gradients: dict[str, Tensor], known: dict[str, Placement], mesh: Mesh, loss: Tensor
) -> tuple[float, float]:
    """The L2 norm of the whole model's gradient, and the mean over the replicas of `loss`: one all-reduce.

    Every element counts once: copies on one tp rank only, replicas on one dp rank, tied weights on one stage.
    """
    counted = [
        gradients[name][ours]
        for name in gradients
        for piece, _, ours in known[name].slices()
        if piece.copy == 0 and known[name].counts
    ]
    sums = torch.zeros(2, dtype=torch.float64, device=loss.device)
    if counted:
        sums[0] = torch.stack([norm.double() for norm in torch._foreach_norm(counted)]).square().sum()
    sums[1] = loss.detach().double() / (mesh.dp.size * mesh.tp.size)
    squares, mean_loss = all_reduce_(sums, mesh.world).tolist()
    return math.sqrt(squares), mean_loss


class Optimizer:
    """AdamW over this rank's part of a model.

    The weights that it updates are fp32 (fp64 for an fp64 model); `dtype` is what the model then computes in.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, config: OptimizerConfig, dtype: torch.dtype | None = None):
        self.config, self.mesh = config, mesh
        self.placements = placements(model, mesh)
        self.steps = 0
        masters = {name: p.detach().clone() for name, p in model.named_parameters()} if _narrow(dtype) else {}
        if dtype is not None:
            model.to(dtype)
        self._weights = dict(model.named_parameters())
        self.masters: dict[str, Tensor] = masters or {
            name: local_part(p.detach())
            for name, p in self._weights.items()  # of FSDP's, the rows of this replica
        }
        groups = [  # decay on matrices only
            {
                "params": [w for w in self.masters.values() if (w.dim() >= 2) == matrices],
                "weight_decay": config.weight_decay if matrices else 0.0,
            }
            for matrices in (True, False)
        ]
        device = next(iter(self.masters.values())).device.type
        self._adamw = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=device in ("cuda", "cpu")
        )

    def step(self, gradients: dict[str, Tensor], lr: float, loss: Tensor) -> tuple[float, float]:
        """Clip the gradients, in place, and update the weights; returns the norm before clipping and the mean loss.

        Raises FloatingPointError, on every rank and before any weight changes, if either is not finite.
        """
        norm, mean_loss = gradient_norm(gradients, self.placements, self.mesh, loss)
        if not math.isfinite(norm + mean_loss):
            raise FloatingPointError(f"gradient norm {norm} or loss {mean_loss} is not finite at step {self.steps}")
        if self.config.clip_norm and norm > self.config.clip_norm:
            torch._foreach_mul_(list(gradients.values()), self.config.clip_norm / norm)
        for name, master in self.masters.items():
            master.grad = gradients.get(name)  # none: frozen
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        for master in self.masters.values():
            master.grad = None  # it belongs to whoever gave it
        self.steps += 1
        self._publish()
        return norm, mean_loss

    def state(self) -> dict[str, Tensor]:
        """Everything to save, as parts to be placed like the parameter in the name: weight/, exp_avg/, exp_avg_sq/."""
        tensors = {f"weight/{name}": master for name, master in self.masters.items()}
        for name, master in self.masters.items():
            state = self._adamw.state[master] or {
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
            tensors[f"exp_avg/{name}"] = state["exp_avg"]
            tensors[f"exp_avg_sq/{name}"] = state["exp_avg_sq"]
        return tensors

    def load_state(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Take over what `state()` gave, after `steps` steps."""
        self.steps = steps
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[f"weight/{name}"])
                self._adamw.state[master] = {
                    "step": torch.tensor(float(steps), device=master.device if master.is_cuda else "cpu"),
                    "exp_avg": tensors[f"exp_avg/{name}"].to(master),
                    "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(master),
                }
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        """Round the fp32 weights into the model, where it computes in another dtype."""
        for name, weight in self._weights.items():
            if weight.dtype != self.masters[name].dtype:
                weight.copy_(self.masters[name])


def _narrow(dtype: torch.dtype | None) -> bool:
    return dtype in (torch.bfloat16, torch.float16)
