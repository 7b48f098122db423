"""The matmuls of sequence parallelism together with their communication, so that one can run beside the other.

    gather_matmul    all-gather along the sequence, then matmuls      column-parallel layers; backward of row-parallel
    matmul_scatter   matmul, then reduce-scatter along the sequence   row-parallel layers; backward of column-parallel

`overlap_mode` chooses one of three ways, which differ in rounding at most:

    symm_mem   torch's fused operators: each rank multiplies its peers' parts as it copies them over NVLink
    chunked    a few chunks of the sequence, a collective each: one is under way while another is multiplied
    plain      one collective, before or after

Source: arXiv 2205.05198, section 4.2 (what is gathered and scattered).
"""

import functools
import logging
import weakref
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tpformer import symmetric_memory
from tpformer.collectives import split_sequence, start_gather_sequence, start_gather_stack, start_scatter_sequence
from tpformer.mesh import Axis, Mesh, Overlap

Mode = Literal["symm_mem", "chunked", "plain"]
MOST_CHUNKS = 4
LEAST_ROWS = 128
"""Of a rank's part of the batch in one chunk: a smaller matmul leaves a GPU idle."""


@torch.no_grad()
def gather_matmul(
    x: Tensor, matrices: Sequence[Tensor], mesh: Mesh, *, least_rows: int = LEAST_ROWS
) -> tuple[Tensor, list[Tensor]]:
    """Collect the sequence over tp and multiply it: x (b, s/tp, d), matrices (d, f) -> (b, s, d), [(b, s, f), ...].

    The results are contiguous; at tp 1 the first is x itself. Not differentiable: for use in autograd Functions.
    least_rows: of a chunk; what does not make two chunks is not chunked.
    Raises ValueError if x is not (b, s/tp, d) or a matrix not (d, f), and as overlap_mode does.
    """
    _check(x, matrices)
    mode = overlap_mode(mesh)
    if mode == "symm_mem":
        return _fused_gather_matmul(x, matrices, mesh.tp)
    lengths = chunk_lengths(x.shape[0], x.shape[1], least_rows)
    if mode == "chunked" and len(lengths) > 1:
        return _chunked_gather_matmul(x, matrices, mesh.tp, lengths)
    whole = x if mesh.tp.size == 1 else start_gather_sequence(x, mesh.tp).wait()
    return whole, [whole @ matrix for matrix in matrices]


@torch.no_grad()
def matmul_scatter(x: Tensor, matrix: Tensor, mesh: Mesh, *, least_rows: int = LEAST_ROWS) -> Tensor:
    """Multiply and sum over tp, each rank keeping its tokens: x (b, s, k), matrix (k, f) -> contiguous (b, s/tp, f).

    Each rank's product is rounded to x's dtype before the sum. symm_mem then adds all in rank order and rounds once;
    the others leave the order, and the roundings between, to the backend. Not differentiable.
    least_rows: of a chunk; what does not make two chunks is not chunked.
    Raises ValueError if x is not (b, s, k), the matrix not (k, f) or tp does not divide s, and as overlap_mode does.
    """
    _check(x, [matrix])
    batch, _, length, _ = split_sequence(x, mesh.tp).transpose(0, 1).shape
    mode = overlap_mode(mesh)
    if mode == "symm_mem":
        return _fused_matmul_scatter(x, matrix, mesh.tp)
    lengths = chunk_lengths(batch, length, least_rows)
    if mode == "chunked" and len(lengths) > 1:
        return _chunked_matmul_scatter(x, matrix, mesh.tp, lengths)
    product = x @ matrix
    return product if mesh.tp.size == 1 else start_scatter_sequence(product, mesh.tp).wait()


def overlap_mode(mesh: Mesh) -> Mode:
    """How this mesh's matmuls meet their communication, the same on every rank of tp; logged once.

    mesh.overlap "auto" is symm_mem where it is available, otherwise chunked on GPUs and plain on CPUs. Whether it is
    available is asked once a process group, collectively, and only if there are GPUs or it was asked for.
    Raises ValueError on every rank if symm_mem was asked for and is not available.
    """
    if mesh.tp.size == 1:
        return "plain"
    assert mesh.tp.group is not None
    # weak, because a group that a cache keeps alive aborts at exit; and groups of one name are not one group
    mode, lacking = _decide(mesh.overlap, weakref.ref(mesh.tp.group), mesh.device)
    if lacking and mesh.overlap == "symm_mem":
        raise ValueError(f"overlap ('symm_mem') is not available: {lacking}; use 'auto', 'chunked' or 'off'")
    return mode


@functools.cache
def _decide(overlap: Overlap, group: "weakref.ref[dist.ProcessGroup]", device: torch.device) -> tuple[Mode, str]:
    """The mode, and what symm_mem lacks."""
    peers = group()
    assert peers is not None
    lacking = ""
    if overlap == "symm_mem" or (overlap == "auto" and device.type == "cuda"):
        lacking = symmetric_memory.missing(peers, device)
        mode: Mode = "chunked" if lacking else "symm_mem"
    else:
        mode = "chunked" if overlap == "chunked" else "plain"
    ways = {
        "symm_mem": "matmuls overlap with their communication through symmetric memory",
        "chunked": "matmuls overlap with their communication by chunks",
        "plain": "matmuls and their communication take turns",
    }
    if dist.get_rank() == 0 and not (lacking and overlap == "symm_mem"):
        why = lacking or f"overlap {overlap!r} on {device.type}"
        logging.getLogger("tpformer").info("tensor parallelism over tp=%d: %s (%s)", peers.size(), ways[mode], why)
    return mode, lacking


def chunk_lengths(batch: int, length: int, least_rows: int) -> list[int]:
    """Split a rank's tokens into at most MOST_CHUNKS nearly even chunks of `least_rows` rows (b x tokens) or more."""
    count = max(1, min(MOST_CHUNKS, length // max(1, -(-least_rows // max(1, batch)))))
    return [length // count + (index < length % count) for index in range(count)]


def _check(x: Tensor, matrices: Sequence[Tensor]) -> None:
    for matrix in matrices:
        if x.dim() != 3 or matrix.dim() != 2 or x.shape[2] != matrix.shape[0]:
            shapes = f"{tuple(x.shape)} @ {tuple(matrix.shape)}"
            raise ValueError(f"x @ matrix must be (b, s, d) @ (d, f), not {shapes}")


def _fused_gather_matmul(x: Tensor, matrices: Sequence[Tensor], axis: Axis) -> tuple[Tensor, list[Tensor]]:
    assert axis.group is not None
    # the operator sends (s/tp, b, d), and asserts that it lies so
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    fused = torch.ops.symm_mem.fused_all_gather_matmul
    whole, products = fused(x, list(matrices), 1, axis.group.group_name)  # (b, s, d), [(b, s, f), ...]
    return whole.contiguous(), [product.contiguous() for product in products]


def _fused_matmul_scatter(x: Tensor, matrix: Tensor, axis: Axis) -> Tensor:
    assert axis.group is not None
    fused = torch.ops.symm_mem.fused_matmul_reduce_scatter
    return fused(x, matrix, "sum", 1, axis.group.group_name).contiguous()  # (b, s/tp, f)


def _chunked_gather_matmul(
    x: Tensor, matrices: Sequence[Tensor], axis: Axis, lengths: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    (batch, length, _), tp = x.shape, axis.size
    # all at once: NCCL (on its own stream) and gloo (on its own thread) run them one after another
    pending = [start_gather_stack(chunk, axis) for chunk in x.split(list(lengths), dim=1)]
    whole = x.new_empty(batch * tp, length, x.shape[2])  # a rank's tokens lie together
    products = [x.new_empty(batch * tp, length, matrix.shape[1]) for matrix in matrices]
    start = 0
    for tokens in lengths:
        chunk = whole[:, start : start + tokens]  # (b·tp, tokens, d)
        chunk.unflatten(0, (batch, tp)).copy_(pending.pop(0).wait().transpose(0, 1))
        for matrix, product in zip(matrices, products, strict=True):
            part, factors = product[:, start : start + tokens], (chunk, matrix.expand(batch * tp, -1, -1))
            if torch.compiler.is_compiling():  # which takes no memory with gaps for an output
                part.copy_(torch.bmm(*factors))
            else:
                torch.bmm(*factors, out=part)
        start += tokens
    return whole.view(batch, tp * length, -1), [product.view(batch, tp * length, -1) for product in products]


def _chunked_matmul_scatter(x: Tensor, matrix: Tensor, axis: Axis, lengths: Sequence[int]) -> Tensor:
    pending = []
    for chunk in x.unflatten(1, (axis.size, -1)).split(list(lengths), dim=2):  # (b, tp, tokens, k)
        rows = chunk.flatten(0, 1)
        product = torch.bmm(rows, matrix.expand(len(rows), -1, -1))  # (b·tp, tokens, f)
        # summed while the next chunk is multiplied
        pending.append(start_scatter_sequence(product.view(x.shape[0], -1, matrix.shape[1]), axis))
    return torch.cat([part.wait() for part in pending], dim=1)
