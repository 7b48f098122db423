"""torch.autograd.Function where a backward may follow, and only its forward where none can."""

from typing import Any

import torch
from torch import Tensor


def apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """function.apply(*inputs); without gradients its forward alone, since `apply` costs as much as a small product."""
    if torch.is_grad_enabled():
        return function.apply(*inputs)
    return function.forward(_Forgetful(), *inputs)


class _Forgetful:
    """The context of a forward that no backward follows."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Nothing is kept."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Nothing is differentiated."""

    def set_materialize_grads(self, value: bool) -> None:
        """There are none."""
