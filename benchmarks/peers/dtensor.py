"""The plain Llama cut by PyTorch's own tensor parallelism (DTensor), in its fastest plan on CPU."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle

from benchmarks.peers.plain import PlainLlama, PlainLlamaConfig, version, with_weights
from benchmarks.peers.step import Step, check_world, gemm_backend

__all__ = ["AXIS", "NAME", "build", "gemm_backend", "version"]

NAME = "torch DTensor"
AXIS: Literal["tp", "dp"] = "tp"


def tensor_parallel_plan() -> dict[str, ParallelStyle]:
    """How each module is cut: 4 all-reduces a layer and 2 around the vocabulary, none twice.

    Without PrepareModuleInput q, k, v, gate and up would each all-reduce their own input gradient (5 a layer
    backward, not 2). Sequence parallelism gains nothing on gloo, whose reduce-scatter is an all-reduce.
    """
    return {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "blocks.*.attention": PrepareModuleInput(
            input_layouts=(Replicate(), None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "blocks.*.attention.q": ColwiseParallel(),
        "blocks.*.attention.k": ColwiseParallel(),
        "blocks.*.attention.v": ColwiseParallel(),
        "blocks.*.attention.out": RowwiseParallel(),
        "blocks.*.mlp": PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)),
        "blocks.*.mlp.gate": ColwiseParallel(),
        "blocks.*.mlp.up": ColwiseParallel(),
        "blocks.*.mlp.down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }


def parallelize(model: PlainLlama, mesh: DeviceMesh) -> PlainLlama:
    """Cut `model` in place over a one-axis mesh; every rank of the mesh calls it, rank 0's weights count."""
    parallelize_module(model, mesh, tensor_parallel_plan())
    return model


def forward_backward(model: PlainLlama, tokens: Tensor, targets: Tensor) -> Tensor:
    """Loss of (b, s) tokens, with gradients left in the parameters; a detached local scalar."""
    # loss_parallel must also enclose the backward: it swaps the operators of the loss in both directions.
    with loss_parallel():
        loss = model.loss(tokens, targets)
        loss.backward()
    return whole(loss.detach())


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on every rank of its mesh, gathered if it is cut."""
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.full_tensor()
    return full.wait() if hasattr(full, "wait") else full


def one_axis_mesh(device: torch.device, size: int) -> DeviceMesh:
    """A mesh of the first `size` ranks; every rank of the job calls it, in the same order."""
    return DeviceMesh(device.type, list(range(size)), mesh_dim_names=("tp",))


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every gradient there is by its parameter's name, gathered if it is cut; collective."""
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def build(shape: PlainLlamaConfig, degree: int, device: torch.device, weights: dict[str, Tensor]) -> Step:
    """The plain model's step, its layers cut over `degree` ranks."""
    check_world(NAME, degree)
    model = parallelize(with_weights(shape, device, weights), one_axis_mesh(device, degree))
    return Step(model, partial(forward_backward, model), partial(whole_gradients, model))
