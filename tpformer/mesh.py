"""Who am I, who are my peers: the live mesh axes seen from this process."""

import atexit
import contextlib
import os
import socket
import time
import uuid
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

    `world` is all axes together, for the one all-reduce of the gradient norm. `dp_shard` is the part of dp whose
    replicas share out their parameters (FSDP), `dp_replicate` the rest of it.
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
    dp_shard: Axis = field(default=Axis("dp_shard"), kw_only=True)
    dp_replicate: Axis = field(default=Axis("dp_replicate"), kw_only=True)

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
        dp_shard: int = 1,
        device: str | None = None,
        timeout_seconds: float = 600.0,
    ) -> "Mesh":
        """The mesh of the processes that torchrun started; dp fills what tp and pp leave.

        dp_shard: how many neighbours on the dp axis share out their parameters; 0 takes all of dp.
        Joins the default process group (NCCL on GPUs, gloo on CPUs) or starts it from torchrun's
        environment; with one process and no launcher there is no process group at all.
        Raises ValueError, before any communication, if the degrees do not match the processes or the GPUs, and as
        ParallelConfig does.
        """
        config = ParallelConfig(tp, pp, dp, sequence_parallel, overlap=overlap)
        world_size = _world_size()
        sizes = config.sizes(world_size)
        shard = dp_shard or sizes[1]
        divide(sizes[1], shard, "dp", "dp_shard")
        place = _device(device)
        if world_size == 1 and not dist.is_initialized() and "RANK" not in os.environ:
            return Mesh(device=place, sequence_parallel=sequence_parallel, overlap=overlap)
        if not dist.is_initialized():
            backend = "nccl" if place.type == "cuda" else "gloo"
            timeout = timedelta(seconds=timeout_seconds)
            store, rank, _ = fresh_store(timeout)
            dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
        device_mesh = _device_mesh(place.type, sizes, shard)
        axes = _axes(device_mesh, shard)
        _set_timeout(axes, timedelta(seconds=timeout_seconds))
        atexit.register(_release, weakref.ref(device_mesh))
        return Mesh(
            world=_world(axes),
            sequence_parallel=sequence_parallel,
            device=place,
            device_mesh=device_mesh,
            overlap=overlap,
            **axes,
        )

    @staticmethod
    def of(config: ParallelConfig, device: str | None = None, *, timeout_seconds: float = 600.0) -> "Mesh":
        """The mesh that a configuration asks for, of the processes that torchrun started.

        Raises as `create` does, and where hsdp is to take the replicas of a node which has none whole.
        """
        shard = 1 if config.dp_mode == "replicate" else config.dp_shard  # 0: all of dp
        if config.dp_mode == "hsdp" and not shard:
            shard = _replicas_of_node(config)
        return Mesh.create(
            config.tp,
            config.pp,
            config.dp,
            config.sequence_parallel,
            overlap=config.overlap,
            dp_shard=shard,
            device=device,
            timeout_seconds=timeout_seconds,
        )

    def close(self) -> None:
        """Leave the process group, if there is one; a rank calls it at its end, or it happens at exit."""
        _release(lambda: self.device_mesh)


def fresh_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """A store that nobody has written to, this process's rank, and how many there are.

    torchrun gives workers that it starts again (--max-restarts) the store of those before them, in which ranks may
    read a dead process's address, and hang (pytorch issue 135712). So rank 0 opens one of its own, and the others
    look for it: the port of one that is dead takes nobody in. Once all have come it is no longer announced, so that
    a rank that makes its next mesh before rank 0 has closed this one waits.
    """
    launchers, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return launchers, rank, world_size
    host, patience = os.environ["MASTER_ADDR"], timedelta(seconds=2)
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        store.set("here", (mark := uuid.uuid4().hex))
        launchers.set("tpformer_store", f"{store.port} {mark}")
        store.wait([f"rank {other}" for other in range(1, world_size)])
        launchers.delete_key("tpformer_store")
        return store, rank, world_size
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        port, mark = launchers.get("tpformer_store").decode().split()
        with contextlib.suppress(dist.DistError, OSError):
            socket.create_connection((host, int(port)), patience.total_seconds()).close()  # a dead one refuses at once
            store = dist.TCPStore(host, int(port), timeout=patience, wait_for_workers=False)
            if store.check(["here"]) and store.get("here").decode() == mark:
                store.set_timeout(timeout)
                store.set(f"rank {rank}", "here")
                return store, rank, world_size
        time.sleep(0.05)
    raise TimeoutError(f"rank {rank} found no store of rank 0 at {host} in {timeout.total_seconds():.0f} s")


def _device_mesh(device_type: str, sizes: tuple[int, int, int], dp_shard: int) -> DeviceMesh:
    """The processes as (pp, dp, tp), or as (pp, dp_replicate, dp_shard, tp) if only a part of dp shares parameters."""
    pp, dp, tp = sizes
    replicas = dp // dp_shard
    if 1 in (dp_shard, replicas):
        return init_device_mesh(device_type, sizes, mesh_dim_names=("pp", "dp", "tp"))
    names = ("pp", "dp_replicate", "dp_shard", "tp")
    return init_device_mesh(device_type, (pp, replicas, dp_shard, tp), mesh_dim_names=names)


def _axes(device_mesh: DeviceMesh, dp_shard: int) -> dict[str, Axis]:
    """All axes but the world, by name."""
    axes = {name: _axis(name, device_mesh) for name in ("pp", "dp", "dp_replicate", "dp_shard", "tp")}
    if "dp_shard" not in (device_mesh.mesh_dim_names or ()):  # one of the two is dp itself
        whole, alone = ("dp_replicate", "dp_shard") if dp_shard == 1 else ("dp_shard", "dp_replicate")
        axes |= {whole: axes["dp"], alone: Axis(alone)}
    return axes


def _set_timeout(axes: dict[str, Axis], timeout: timedelta) -> None:
    """torch gives new groups a time-out of its own, and the default group may be older than this mesh."""
    for axis in axes.values():
        if axis.group is not None:
            dist.distributed_c10d._set_pg_timeout(timeout, axis.group)


def _world(axes: dict[str, Axis]) -> Axis:
    """All axes together: the default group."""
    world = Axis("world", dist.get_world_size(), dist.get_rank())
    # torch gives an axis that is the whole world the default group: let the trace name the axis
    named = [name for name in ("pp", "dp", "tp") if axes[name].size == world.size > 1]
    if world.group is not None:
        world.group._set_group_desc(f"mesh_{named[0]}" if named else "default_pg")
    return world


def _axis(name: str, device_mesh: DeviceMesh) -> Axis:
    """One axis of the mesh, alone if the mesh does not have it; dp may be two of its axes."""
    names = device_mesh.mesh_dim_names or ()
    if name in names:
        return Axis(name, device_mesh[name].size(), device_mesh[name].get_local_rank(), device_mesh)
    if name != "dp":
        return Axis(name)
    dp = device_mesh["dp_replicate", "dp_shard"]._flatten("dp")
    return Axis("dp", dp.size(), dp.get_local_rank(), dp)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def _replicas_of_node(config: ParallelConfig) -> int:
    """How many neighbours on the dp axis torchrun started on one machine.

    Raises ValueError if a machine has not even one: its tp ranks lie on several.
    """
    _, dp, tp = config.sizes(_world_size())
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if here < tp:
        raise ValueError(f"dp_mode hsdp: a node's {here} processes have no whole replica of tp ({tp}); give dp_shard")
    return min(dp, here // tp)  # pp is outermost: a node may have all replicas of a stage, and several stages


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
