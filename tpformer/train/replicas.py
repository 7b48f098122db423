"""Copies that must be equal bit for bit, compared by checksums: what drifted says which tensor, and on which ranks.

Copies are, by Placement: a slice that several tp ranks hold (norms, shared key-value heads), everything that replicas
hold, and tied embeddings on two pipeline stages; of weights and of the optimizer's moments alike.
"""

from hashlib import blake2b

import torch
import torch.distributed as dist
from torch import Tensor

from tpformer.collectives import gather_stack, gather_texts
from tpformer.mesh import Axis, Mesh
from tpformer.placement import Placement

_CHUNK = 1 << 20  # elements: what is widened to int64 at a time
_GOLDEN = -7046029254386353131  # 2**64 / the golden ratio, odd, as int64 (Knuth, TAOCP 6.4)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # halves: see `checksum`


class ReplicaDriftError(RuntimeError):
    """Copies of one tensor are not equal; the same words on every rank."""


def check_replicas(tensors: dict[str, Tensor], known: dict[str, Placement], mesh: Mesh, step: int) -> None:
    """Compare all copies of tensors, which are named "kind/parameter" as in a checkpoint; collective.

    A checksum of each slice is gathered over tp, over the replicas and over the pipeline's stages. Raises
    ReplicaDriftError on every rank, naming what the first rank that sees a difference has seen.
    """
    if mesh.world.size == 1:
        return
    sums = checksums(tensors, known)
    problem = ""
    for axis in (mesh.tp, mesh.dp_replicate, mesh.pp):
        problem = _compare(sums, axis) or problem  # on every axis, whatever was found: it is collective
    assert mesh.world.group is not None
    found = next((text for text in gather_texts(problem, mesh.world.group) if text), "")
    if found:
        raise ReplicaDriftError(f"{found} at step {step}")


def checksums(tensors: dict[str, Tensor], known: dict[str, Placement]) -> dict[int, tuple[str, Tensor]]:
    """Of every slice that this rank holds: a number for what it is, its name, and the checksum of its bits."""
    sums: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        placement = known[name.split("/", 1)[-1]]
        for _, whole, ours in placement.slices():
            box = [slice_.indices(length)[:2] for slice_, length in zip(whole, placement.shape, strict=False)]
            sums[_number(f"{name} {box}")] = name, checksum(tensor[ours])
    return sums


def checksum(x: Tensor) -> Tensor:
    """An int64 scalar in which each element's bits, at most 32, count times an odd number of their own, modulo 2**64.

    So no single element can change without it; nor do changes of two cancel, but by a chance of about 2**-32.
    """
    bits = x.detach().contiguous().view(-1).view(_INTEGERS[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for first in range(0, bits.numel(), _CHUNK):
        part = bits[first : first + _CHUNK].long()
        numbers = torch.arange(first, first + part.numel(), device=x.device)
        total += (part * (numbers * _GOLDEN * 2 + 1)).sum()
    return total


def _number(text: str) -> int:
    """A stable int64 for a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _compare(sums: dict[int, tuple[str, Tensor]], axis: Axis) -> str:
    """What differs between ranks of the axis that hold the same slice; "" if nothing does; collective."""
    if axis.size == 1:
        return ""
    device = next(iter(sums.values()))[1].device
    counts = gather_stack(torch.tensor(len(sums), device=device), axis).tolist()
    table = torch.zeros(max(counts), 2, dtype=torch.int64, device=device)  # stages hold different numbers of slices
    table[: len(sums), 0] = torch.tensor(list(sums), device=device)
    table[: len(sums), 1] = torch.stack([value.to(device) for _, value in sums.values()])
    holders: dict[int, dict[int, list[int]]] = {}
    for rank, (count, rows) in enumerate(zip(counts, gather_stack(table, axis).tolist(), strict=True)):
        for number, value in rows[:count]:
            holders.setdefault(number, {}).setdefault(value, []).append(rank)
    for number, (name, _) in sums.items():
        if len(holders[number]) > 1:
            return _words(name, list(holders[number].values()), axis)
    return ""


def _words(name: str, groups: list[list[int]], axis: Axis) -> str:
    """Which tensor differs between which ranks; two ranks by name, more as those that agree."""
    assert axis.group is not None
    world = dist.get_process_group_ranks(axis.group)
    kind, _, parameter = name.partition("/")
    said = " and ".join(" ".join(map(str, ranks)) for ranks in groups)
    told = " and ".join(" ".join(str(world[rank]) for rank in ranks) for ranks in groups)
    what = parameter if kind == "weight" else f"{kind} of {parameter}"
    return f"{what} differs between {axis.name} ranks {said} (of all ranks {told})"
