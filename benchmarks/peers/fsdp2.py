"""The plain Llama on replicas that share out its parameters, by torch's fully_shard (FSDP2) alone."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.peers.dtensor import whole_gradients
from benchmarks.peers.plain import PlainLlamaConfig, version, with_weights
from benchmarks.peers.replicas import fully_sharded
from benchmarks.peers.step import Step, check_world, gemm_backend

__all__ = ["AXIS", "NAME", "build", "gemm_backend", "version"]

NAME = "torch FSDP2"
AXIS: Literal["tp", "dp"] = "dp"


def build(shape: PlainLlamaConfig, degree: int, device: torch.device, weights: dict[str, Tensor]) -> Step:
    """The plain model's step, on `degree` replicas that each take their share of the samples.

    The step raises ValueError if the samples cannot be shared out evenly.
    """
    check_world(NAME, degree)
    mesh = DeviceMesh(device.type, list(range(degree)), mesh_dim_names=("dp",))
    model = fully_sharded(with_weights(shape, device, weights), mesh)

    def forward_backward(tokens: Tensor, targets: Tensor) -> Tensor:
        if len(tokens) % degree:
            raise ValueError(f"{NAME}: {len(tokens)} samples cannot be shared out evenly over {degree} replicas")
        mine = dist.get_rank()
        loss = model(tokens.chunk(degree)[mine], targets.chunk(degree)[mine])
        loss.backward()  # leaves the replicas' mean in the parameters
        total = loss.detach() / degree
        dist.all_reduce(total)
        return total

    def gradients() -> dict[str, Tensor]:
        return {name.removeprefix("model."): gradient for name, gradient in whole_gradients(model).items()}

    return Step(model, forward_backward, gradients)
