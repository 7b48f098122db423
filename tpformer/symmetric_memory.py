"""Can the processes of a group read each other's GPU memory over NVLink, as torch's fused matmuls do?"""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symmetric_memory

from tpformer.collectives import gather_texts


@dataclass(frozen=True)
class Place:
    """Where a process computes: its host and the identity of its GPU, which every process numbers for itself."""

    host: str
    gpu: str


def missing(group: dist.ProcessGroup, device: torch.device) -> str:
    """What symmetric memory lacks in this group, "" if nothing: the first rank's answer, on every rank; collective."""
    places = [Place(*text.split("\n")) for text in gather_texts(f"{socket.gethostname()}\n{_gpu(device)}", group)]
    for ask in (lambda: _hardware(places, group.rank()), lambda: _trial(group)):
        # each question is put only when no rank has a complaint, so that all or none join the trial
        if lacking := next(filter(None, gather_texts(ask(), group)), ""):
            return lacking
    return ""


def unreachable(
    places: Sequence[Place],
    rank: int,
    visible: Sequence[str],
    peer_access: Callable[[int, int], bool],
    nvlinks: Sequence[Sequence[int]],
) -> str:
    """What keeps this rank from its peers' memory, "" if nothing.

    visible: the GPUs that this process sees, in its order; nvlinks: how many NVLinks join two of them.
    """
    mine = places[rank]
    if not mine.gpu:
        return f"rank {rank} computes on a CPU"
    for peer, place in enumerate(places):
        if peer == rank:
            continue
        if place.host != mine.host:
            return f"ranks {rank} and {peer} are on two hosts, {mine.host} and {place.host}"
        if place.gpu == mine.gpu:
            return f"ranks {rank} and {peer} share one GPU"
        if place.gpu not in visible:
            return f"rank {rank} does not see the GPU of rank {peer} (is CUDA_VISIBLE_DEVICES set for each rank?)"
        i, j = visible.index(mine.gpu), visible.index(place.gpu)
        if not (peer_access(i, j) and peer_access(j, i)):
            return f"no peer access between GPUs {i} and {j}"
        if not nvlinks[i][j]:
            return f"no NVLink between GPUs {i} and {j}"
    return ""


def _gpu(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _hardware(places: Sequence[Place], rank: int) -> str:
    visible = [_gpu(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    try:
        nvlinks = _nvlinks() if len(places) > 1 and places[rank].gpu else []
    except (ImportError, RuntimeError) as error:
        return f"torch cannot tell which GPUs NVLink joins: {_first_line(error)}"
    return unreachable(places, rank, visible, torch.cuda.can_device_access_peer, nvlinks)


def _nvlinks() -> Sequence[Sequence[int]]:
    """How many NVLinks join each two visible GPUs, through a switch or not: torch's own detector, by NVML."""
    from torch._C._autograd import DeviceType
    from torch._C._distributed_c10d import _detect_dma_connectivity  # type: ignore[attr-defined]

    return _detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix


def _trial(group: dist.ProcessGroup) -> str:
    """Exchange a first workspace, as the fused operators will."""
    try:
        symmetric_memory.get_symm_mem_workspace(group.group_name, min_size=1)
    except RuntimeError as error:
        return f"torch's symmetric memory refuses: {_first_line(error)}"
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
