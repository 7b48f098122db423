"""Who am I, who are my peers: the live mesh axes seen from this process."""

import atexit
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tpformer.parallel_config import Overlap, ParallelConfig, check_choice


@dataclass(frozen=True)
class Axis:
    """One named axis of the mesh as this process sees it; size 1 is a process alone, without a group."""

    name: str
    size: int = 1
    rank: int = 0
    device_mesh: DeviceMesh | None = None

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group, looked up each time so that no reference outlives `Mesh.close`."""
        return dist.group.WORLD if self.device_mesh is None else self.device_mesh.get_group(self.name)


@dataclass(frozen=True)
class Mesh:
    """The live axes `pp, dp, tp` of this process, passed to whatever is parallel; `Mesh()` is one process.

    `world` is all axes together, for the one all-reduce of the gradient norm.
    Raises ValueError for an unknown overlap.
    """

    pp: Axis = Axis("pp")
    dp: Axis = Axis("dp")
    tp: Axis = Axis("tp")
    world: Axis = Axis("world")
    sequence_parallel: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    device_mesh: DeviceMesh | None = None
    overlap: Overlap = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        check_choice("overlap", self.overlap, get_args(Overlap))

    @staticmethod
    def create(
        tp: int = 1,
        pp: int = 1,
        dp: int | None = None,
        sequence_parallel: bool = False,
        *,
        overlap: Overlap = "auto",
        device: str | None = None,
        timeout_seconds: float = 600.0,
    ) -> "Mesh":
        """The mesh of the processes that torchrun started; dp fills what tp and pp leave.

        Joins the default process group (NCCL on GPUs, gloo on CPUs) or starts it from torchrun's
        environment; with one process and no launcher there is no process group at all.
        Raises ValueError, before any communication, if the degrees do not match the processes or the GPUs, and as
        ParallelConfig does.
        """
        config = ParallelConfig(tp, pp, dp, sequence_parallel, overlap=overlap)
        world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
        sizes = config.sizes(world_size)
        place = _device(device)
        if world_size == 1 and not dist.is_initialized() and "RANK" not in os.environ:
            return Mesh(device=place, sequence_parallel=sequence_parallel, overlap=overlap)
        if not dist.is_initialized():
            backend = "nccl" if place.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        device_mesh = init_device_mesh(place.type, sizes, mesh_dim_names=("pp", "dp", "tp"))
        pp_axis, dp_axis, tp_axis = (
            Axis(name, size, device_mesh.get_local_rank(name), device_mesh)
            for name, size in zip(("pp", "dp", "tp"), sizes, strict=True)
        )
        world = Axis("world", world_size, dist.get_rank())
        # torch gives an axis that is the whole world the default group: let the trace name the axis
        alone = [axis.name for axis in (pp_axis, dp_axis, tp_axis) if axis.size == world_size > 1]
        if world.group is not None:
            world.group._set_group_desc(f"mesh_{alone[0]}" if alone else "default_pg")
        atexit.register(_release, weakref.ref(device_mesh))
        return Mesh(pp_axis, dp_axis, tp_axis, world, sequence_parallel, place, device_mesh, overlap=overlap)

    def close(self) -> None:
        """Leave the process group, if there is one; a rank calls it at its end, or it happens at exit."""
        _release(lambda: self.device_mesh)


def _release(device_mesh: Callable[[], DeviceMesh | None]) -> None:
    """End the process groups and let go of them: one still held when the interpreter ends aborts it (gloo)."""
    if dist.is_initialized():
        dist.destroy_process_group()
    getattr(device_mesh(), "_pg_registry", {}).clear()


def _device(name: str | None) -> torch.device:
    """This process's device: the GPU of its local rank where there are GPUs, otherwise the CPU."""
    if (name or "cuda") == "cpu" or not torch.cuda.is_available():
        if name not in (None, "cpu"):
            raise ValueError(f"device {name!r} was asked for, but torch sees no GPU here; use --device cpu")
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} needs {local_rank + 1} GPUs, but this machine has "
            f"{torch.cuda.device_count()}: start fewer processes per node, or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def divide(total: int, parts: int, total_name: str, parts_name: str = "tp") -> int:
    """`total / parts`; raises ValueError naming both values if it is not whole."""
    if total % parts:
        raise ValueError(f"{total_name} ({total}) must be divisible by {parts_name} ({parts})")
    return total // parts
