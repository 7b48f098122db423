"""Replicas that share out gradients and optimizer state, or parameters too: FSDP2 over tensor-parallel local tensors.

Sources: ZeRO (arXiv 1910.02054), PyTorch FSDP (2304.11277).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from tpformer.mesh import Mesh
from tpformer.models.stage import DecoderStage
from tpformer.parallel_config import V_SHAPED, ParallelConfig
from tpformer.placement import local_part, placements, sum_partial


def is_sharded(mesh: Mesh, config: ParallelConfig) -> bool:
    """Whether replicas share anything out: with one replica in a group there is nothing to share.

    Raises ValueError for a mesh that was not made for this dp_mode.
    """
    expected = {"replicate": 1, "hsdp": mesh.dp_shard.size}.get(config.dp_mode, mesh.dp.size)
    if mesh.dp_shard.size != expected:
        raise ValueError(
            f"dp_mode ({config.dp_mode}) needs groups of {expected} replicas, but the mesh has {mesh.dp_shard.size}: "
            "make it with Mesh.of"
        )
    return mesh.dp_shard.size > 1


def shard(
    stages: dict[int, DecoderStage], mesh: Mesh, config: ParallelConfig, dtype: torch.dtype | None = None
) -> None:
    """Share the parameters of a process's stages out over its replicas, block by block; uninitialised memory after.

    The stages lie on the meta device before, so that no rank ever holds a whole model. Their parameters become the
    fp32 masters, of which a rank has its rows; forward and backward see plain tp-local tensors, in dtype if given.
    Raises ValueError for tied embeddings in a V-shaped pipeline.
    """
    first = next(iter(stages.values()))
    _check_stages(config, first.config.tie_embeddings)
    policy: Any = {"mesh": _replicas(mesh), "mp_policy": _policy(first, dtype)}
    # zero2 keeps them for the step; so does a pipeline, whose micro-batches would gather them again and again
    between = config.dp_mode != "zero2" and config.pp == 1
    for stage in stages.values():
        blocks = list(stage.blocks.values())
        for block in blocks:
            fully_shard(block, reshard_after_forward=between, **policy)
        # the ends, in one group because a tied head has the embedding's weight; backward begins with them at once
        fully_shard(stage, reshard_after_forward=False, **policy)
        units: list[Any] = [stage, *blocks]
        for unit, following in pairwise(units):
            unit.set_modules_to_forward_prefetch([following])  # backward's order torch finds out by itself
        for unit in units:  # sums, not means: the loss is scaled, and a sum is what gloo has
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        stage.register_forward_hook(_release_without_gradient)
        stage.to_empty(device=mesh.device)


class ShardedGradients:
    """The gradient of every parameter that `shard` shared out, summed over all replicas: this rank's rows of it.

    FSDP2 reduces a block's gradients in fp32 (fp64 for fp64 parameters) while the rest of backward runs. Earlier
    micro-batches communicate none: they add up whole on every rank, in fp32, 4 bytes a parameter until the last one.
    Used as `data.GradientBuckets` is: `start(last=...)` and backward for each micro-batch, `finish()` at the end.
    """

    def __init__(self, model: nn.Module, stages: dict[int, DecoderStage], mesh: Mesh, config: ParallelConfig):
        self._mesh = mesh
        self._stages: list[Any] = list(stages.values())
        self._placements = placements(model, mesh)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._scheduled = config.pp > 1
        self._keep = config.dp_mode == "zero2"

    def start(self, *, last: bool) -> None:
        """Before each micro-batch's backward: is it the step's last one?"""
        if self._scheduled:
            return  # torch's schedules say the same to FSDP, and reduce once they are through
        for stage in self._stages:
            stage.set_requires_gradient_sync(last)
            stage.set_is_last_backward(last)
            stage.set_reshard_after_backward(last or not self._keep)

    def postpone(self, waiting: list[Callable[[], None]] | None) -> None:
        """Nothing: the gradients of weights come with those of activations, in zero-bubble schedules too."""

    def finish(self) -> dict[str, Tensor]:
        """The whole step's gradient, this rank's part of it, of every parameter by name."""
        for stage in self._stages:
            _release(stage)  # whatever backward did not reach: the optimizer is about to change the masters
        found = {}
        for name, parameter in self._parameters.items():
            gradient = parameter.grad  # none: the parameter took no part
            found[name] = torch.zeros_like(local_part(parameter.detach())) if gradient is None else local_part(gradient)
            parameter.grad = None
        sum_partial(found, self._placements, self._mesh.tp)
        return found

    def buffers(self) -> list[Tensor]:
        """None: they are made anew in each step."""
        return []

    def nbytes(self) -> int:
        """Bytes of this rank's rows of the gradients."""
        return sum(local_part(p.detach()).nbytes for p in self._parameters.values())

    def close(self) -> None:
        """Nothing: FSDP2 cannot be taken off a model."""


def _replicas(mesh: Mesh) -> Any:
    """The mesh that fully_shard takes: the replicas of a group, or groups x replicas (HSDP)."""
    assert mesh.device_mesh is not None  # the group has more than one replica
    if mesh.dp_replicate.size > 1:
        return mesh.device_mesh[mesh.dp_replicate.name, mesh.dp_shard.name]
    return mesh.device_mesh[mesh.dp_shard.name]


def _policy(stage: DecoderStage, dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    wide = torch.promote_types(next(stage.parameters()).dtype, torch.float32)
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)


def _check_stages(config: ParallelConfig, tied: bool) -> None:
    """Raises ValueError, on every rank, where a tied embedding would belong to two FSDP roots of one process."""
    if tied and config.pp > 1 and config.pp_schedule in V_SHAPED:
        raise ValueError(
            f"pp_schedule ({config.pp_schedule}) puts both ends of a model on one process, which dp_mode "
            f"({config.dp_mode}) cannot with tie_embeddings: untie them, or take dp_mode replicate"
        )


def _release(stage: nn.Module) -> None:
    """Let go of all gathered parameters."""
    for unit in stage.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def _release_without_gradient(stage: nn.Module, args: Any, output: Any) -> None:
    """After a forward that no backward follows: nothing gathered outlives it to be stale after weights change.

    FSDP2 itself keeps the root's parameters, and those of zero2 and pipelines, gathered until a backward.
    """
    if not torch.is_grad_enabled():
        _release(stage)
