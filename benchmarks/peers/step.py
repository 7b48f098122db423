"""What every driver builds: one training step without an optimizer, and its gradients to compare."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    """zero_grad(set_to_none=True), forward, mean cross entropy and backward; the gradients stay in the parameters.

    `gradients`, called on every rank, gives them whole: under the names and in the layout of the plain model.
    """

    model: nn.Module
    forward_backward: Callable[[Tensor, Tensor], Tensor]
    gradients: Callable[[], dict[str, Tensor]]

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """int64 (b, s) twice, the same on every rank -> the detached mean nats per token, the same on every rank."""
        self.model.zero_grad(set_to_none=True)
        return self.forward_backward(tokens, targets)


def installed(package: str) -> str:
    """The version of a package; raises ImportError with one line if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{package} is not installed; pyproject.toml's extra `peers` says which version") from None


def gemm_backend(device: torch.device) -> str:
    """What torch itself multiplies fp32 matrices with on this device; every peer leaves it to torch."""
    if device.type == "cuda":
        return "cuBLAS"
    found = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return f"{found[1].upper() if found else 'unknown BLAS'} sgemm"


def check_world(kind: str, degree: int) -> None:
    """Raises ValueError unless the process group has exactly `degree` ranks; without a group there is one."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world != degree:
        raise ValueError(f"{kind}: degree {degree} needs as many ranks, and this process group has {world}")


def dtype_of(weights: dict[str, Tensor]) -> torch.dtype:
    """The one dtype of all weights; raises ValueError if there are several."""
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) != 1:
        raise ValueError(f"the weights must have one dtype, not {sorted(map(str, dtypes))}")
    return dtypes.pop()
