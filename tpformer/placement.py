"""How each parameter lies across the tensor-parallel ranks: the one truth for sharding.

A layer keeps `placements`, one Placement for each parameter of its own; initialisation, gradient reduction,
norm clipping and checkpoints all read it. A parameter without one is a whole copy on every rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tpformer.collectives import all_reduce_
from tpformer.mesh import Axis, Mesh


@dataclass(frozen=True)
class Piece:
    """A slice [start, start + size) along the split dim of a parameter, as held by this rank.

    `copies` ranks hold the same slice; `copy` 0 of them is the one that counts in norms and is saved.
    """

    start: int
    size: int
    copies: int = 1
    copy: int = 0


@dataclass(frozen=True)
class Placement:
    """Where this rank's part of one parameter lies in the whole of it.

    shape: of the whole parameter, without padding. dim: the one that is split over tp.
    pieces: this rank's slices along `dim`, in the order in which they lie in the tp-local tensor;
    what the tp-local tensor has beyond them is padding, always zero.
    partial: each copy's gradient is only this rank's part of it and must be summed over the copies.
    rows: [start, stop) along dim 0 of the tp-local tensor, where replicas share it out (FSDP); None: all of it.
    replica: which of the equal ones on other replicas or pipeline stages this is; 0 counts in norms and is saved.
    """

    shape: tuple[int, ...]
    dim: int
    pieces: tuple[Piece, ...]
    partial: bool = False
    rows: tuple[int, int] | None = None
    replica: int = 0

    def slices(self) -> Iterator[tuple[Piece, tuple[slice, ...], tuple[slice, ...]]]:
        """Each non-empty piece with its index into the whole tensor and into the local one."""
        offset = 0
        whole: tuple[slice, ...]
        local: tuple[slice, ...]
        if not self.shape:  # a scalar: one copied piece, indexed whole
            yield self.pieces[0], (), ()
            return
        for piece in self.pieces:
            first, last = offset, offset + piece.size
            offset = last
            if self.dim == 0:
                start, stop = self.rows or (0, last)
                mine = max(first, start), min(last, stop)
                whole = (slice(piece.start + mine[0] - first, piece.start + mine[1] - first),)
                local = (slice(mine[0] - start, mine[1] - start),)
            else:
                mine = self.rows or (0, self.shape[0])
                before = (slice(None),) * (self.dim - 1)
                whole = (
                    slice(*mine) if self.rows else slice(None),
                    *before,
                    slice(piece.start, piece.start + piece.size),
                )
                local = (slice(None), *before, slice(first, last))
            if piece.size and mine[0] < mine[1]:
                yield piece, whole, local

    @property
    def counts(self) -> bool:
        """Whether this is the one of equal replicas that counts in norms and is saved."""
        return self.replica == 0


def replicated(shape: tuple[int, ...], axis: Axis, partial: bool = False) -> Placement:
    """A whole copy on every rank of the axis."""
    return Placement(shape, 0, (Piece(0, shape[0] if shape else 1, axis.size, axis.rank),), partial)


def split(shape: tuple[int, ...], dim: int, axis: Axis, local_size: int) -> Placement:
    """`local_size` in a row for each rank along `dim`; the last ranks have less where that exceeds the shape."""
    start = min(axis.rank * local_size, shape[dim])
    return Placement(shape, dim, (Piece(start, min(local_size, shape[dim] - start)),))


def placements(model: nn.Module, mesh: Mesh) -> dict[str, Placement]:
    """The placement of every parameter by name; shared parameters count once.

    Raises ValueError for a parameter without a placement under sequence parallelism, where its gradient
    would silently be a part only.
    """
    found: dict[str, Placement] = {}
    owners = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        prefix, _, leaf = name.rpartition(".")
        placement = getattr(owners[prefix], "placements", {}).get(leaf)
        if placement is None and mesh.sequence_parallel and mesh.tp.size > 1:
            raise ValueError(
                f"parameter {name} ({type(owners[prefix]).__name__}) has no Placement: under sequence parallelism "
                "its gradient would be partial; use a tpformer layer, or set `placements` on its module"
            )
        found[name] = _on_replicas(placement or replicated(tuple(parameter.shape), mesh.tp), parameter, mesh)
    return found


def _on_replicas(placement: Placement, parameter: Tensor, mesh: Mesh) -> Placement:
    """The placement of what this replica holds of a tp-local parameter: all of it, or its rows of an FSDP one."""
    if not isinstance(parameter, DTensor):
        return replace(placement, replica=placement.replica or mesh.dp.rank)
    length, shard = parameter.shape[0], mesh.dp_shard
    size = -(-length // shard.size)  # as torch.chunk, by which FSDP2 shares out
    rows = min(shard.rank * size, length), min((shard.rank + 1) * size, length)
    return replace(placement, rows=rows, replica=placement.replica or mesh.dp.rank // shard.size)


def mesh_of(model: nn.Module) -> Mesh:
    """The mesh that the first parallel layer of `model` was built on; `Mesh()` if there is none."""
    meshes = (getattr(module, "mesh", None) for module in model.modules())
    return next((mesh for mesh in meshes if isinstance(mesh, Mesh)), Mesh())


def load_full(local: Tensor, placement: Placement, whole: Tensor) -> None:
    """Copy this rank's part of `whole` into `local`, in place; padding becomes zero.

    Raises ValueError if `whole` has another shape than the placement says.
    """
    if tuple(whole.shape) != placement.shape:
        raise ValueError(f"shape {tuple(whole.shape)} does not match the parameter's {placement.shape}")
    with torch.no_grad():
        local.zero_()
        for _, theirs, ours in placement.slices():
            local[ours] = whole[theirs].to(local)


def gather_full(local: Tensor, placement: Placement, *axes: Axis) -> Tensor:
    """The whole tensor on every rank of the axes, from each rank's part; collective.

    Raises RuntimeError, on every rank, if copies of the same slice differ.
    """
    local = local_part(local.detach())
    whole = local.new_zeros(placement.shape)
    for piece, theirs, ours in placement.slices():
        if piece.copy == 0:
            whole[theirs] = local[ours]
    for axis in axes:
        all_reduce_(_bits(whole), axis)  # one rank has the bits of an element, the others have zeros
    differ = sum(not torch.equal(_bits(whole[theirs]), _bits(local[ours])) for _, theirs, ours in placement.slices())
    problems = torch.tensor(float(differ), device=whole.device)
    for axis in axes:
        all_reduce_(problems, axis)
    if problems.item():
        raise RuntimeError(
            "copies of this tensor differ between tensor-parallel ranks; if it is a gradient, "
            "call tpformer.reduce_partial_gradients(model) after backward"
        )
    return whole


def _bits(x: Tensor) -> Tensor:
    """The bytes of x, by which NaN equals itself and -0.0 is not 0.0; a view where x is contiguous."""
    return x.contiguous().view(-1).view(torch.uint8)


def local_part(x: Tensor) -> Tensor:
    """What this rank holds of a tensor; FSDP2 keeps parameters and gradients as DTensors over the replicas."""
    return x.to_local() if isinstance(x, DTensor) else x


def full_parameter(model: nn.Module, name: str) -> Tensor:
    """The whole parameter called `name`, on every rank; collective."""
    mesh = mesh_of(model)
    return gather_full(model.get_parameter(name), placements(model, mesh)[name], mesh.tp, mesh.dp_shard)


def full_gradient(model: nn.Module, name: str) -> Tensor:
    """The whole gradient of the parameter called `name`, on every rank; collective.

    Raises ValueError if it has no gradient, RuntimeError if partial gradients were not yet summed.
    """
    mesh = mesh_of(model)
    gradient = model.get_parameter(name).grad
    if gradient is None:
        raise ValueError(f"parameter {name} has no gradient; call backward first")
    return gather_full(gradient, placements(model, mesh)[name], mesh.tp, mesh.dp_shard)


def load_full_state(model: nn.Module, whole: dict[str, Tensor]) -> None:
    """Copy this rank's part of each whole tensor into the parameter of that name.

    Raises ValueError naming every missing, unknown or misshapen tensor, before any is copied.
    """
    known = placements(model, mesh_of(model))
    problems = [f"missing {name}" for name in known if name not in whole]
    problems += [f"unknown {name}" for name in whole if name not in known]
    problems += [
        f"{name} has shape {tuple(whole[name].shape)}, expected {known[name].shape}"
        for name in known
        if name in whole and tuple(whole[name].shape) != known[name].shape
    ]
    if problems:
        raise ValueError("the state does not fit the model: " + "; ".join(problems))
    for name, parameter in model.named_parameters():
        load_full(local_part(parameter.detach()), known[name], whole[name])


def sum_partial(tensors: dict[str, Tensor], known: dict[str, Placement], axis: Axis) -> None:
    """Sum the partial copies among `tensors` (by parameter name) over the axis, in place, in one all-reduce.

    It adds in fp32 (fp64 for fp64). Ranks that hold the same copy share a slot of the one buffer, so copies
    held by some ranks only need no process group of their own.
    """
    slots: list[tuple[Tensor, slice]] = []
    end = 0
    for name, tensor in tensors.items():
        for piece, _, ours in known[name].slices() if known[name].partial and axis.size > 1 else ():
            if piece.copies > 1:
                view = tensor[ours]
                start = end + axis.rank // piece.copies * view.numel()  # ranks with one copy are neighbours
                slots.append((view, slice(start, start + view.numel())))
                end += axis.size // piece.copies * view.numel()
    if not slots:
        return
    dtype = torch.float64 if any(view.dtype == torch.float64 for view, _ in slots) else torch.float32
    buffer = torch.zeros(end, dtype=dtype, device=slots[0][0].device)
    for view, slot in slots:
        buffer[slot] = view.flatten().to(dtype)
    all_reduce_(buffer, axis)
    for view, slot in slots:
        view.copy_(buffer[slot].view_as(view))


def reduce_partial_gradients(model: nn.Module) -> None:
    """Sum the partial gradients over tp, once, after the last backward of a step; collective."""
    mesh = mesh_of(model)
    gradients = {name: local_part(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    sum_partial(gradients, placements(model, mesh), mesh.tp)
