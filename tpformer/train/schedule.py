"""The optimizer's settings, and its learning rate over time."""

import math
from dataclasses import dataclass
from typing import Literal


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
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is nan or inf: stop, or skip that step. fp16 skips, by its loss scale, in any case."""
    max_skipped: int = 10
    """How many steps in a row may be skipped; one more stops the run."""

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
            "on_nonfinite": self.on_nonfinite in ("stop", "skip"),
            "max_skipped": self.max_skipped >= 0,
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
