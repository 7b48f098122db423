"""Dynamic loss scaling, for fp16."""

from dataclasses import dataclass


@dataclass
class LossScaler:
    """What the loss is multiplied by, so that fp16 can hold its gradients (arXiv 1710.03740, section 3.2).

    It grows while every gradient is finite, and falls, and the step is skipped, when one is not.
    """

    scale: float = 2.0**16
    growth_interval: int = 1000
    """Good steps one after another before it grows."""
    growth: float = 2.0
    backoff: float = 0.5
    minimum: float = 1.0
    good_steps: int = 0
    """Since it last changed."""
    skipped: int = 0
    """Steps skipped so far in the run."""

    def update(self, finite: bool) -> None:
        """After a step's gradients are known, on every rank with the same answer.

        Raises FloatingPointError if they are not finite and the scale cannot fall further.
        """
        if not finite:
            if self.scale <= self.minimum:
                raise FloatingPointError(
                    f"gradient norm or loss is not finite although the loss scale is at its minimum ({self.minimum}) "
                    f"after {self.skipped} skipped steps: fp16 cannot hold this model's numbers, use bf16"
                )
            self.scale = max(self.minimum, self.scale * self.backoff)
            self.good_steps = 0
            self.skipped += 1
            return
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.scale *= self.growth
            self.good_steps = 0

    def state(self) -> dict[str, float]:
        """What a checkpoint's JSON has to hold."""
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped": self.skipped}

    def load_state(self, state: dict[str, float]) -> None:
        """Take over what `state()` gave."""
        self.scale, self.good_steps, self.skipped = state["scale"], int(state["good_steps"]), int(state["skipped"])
