"""Each way of `tpformer.overlap` on CPU tensors; torch's fused operators, which know GPUs only, over gloo."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as torch_s

from tpformer import Mesh, overlap, symmetric_memory
from tpformer.mesh import Overlap
from tpformer.overlap import chunk_lengths, gather_matmul, matmul_scatter

WAYS: dict[str, Overlap] = {
    "plain": "off",
    "chunked": "chunked",
    "symm_mem fallback": "symm_mem",
    "symm_mem cuda": "symm_mem",
}
GATHER, SCATTER = "fused_all_gather_matmul", "fused_matmul_reduce_scatter"
LEAST_ROWS = 2


def mesh_for(way: str) -> Mesh:
    """Over all processes, taking this way."""
    size = torch.distributed.get_world_size()
    return replace(Mesh.create(tp=size), sequence_parallel=True, overlap=WAYS[way])


def operators(way: str) -> Any:
    """What the way needs on a CPU, for a `with`."""
    return fused_operators(way.split()[1]) if way.startswith("symm_mem") else nullcontext()


def gather(x: Tensor, matrices: Sequence[Tensor], mesh: Mesh) -> tuple[Tensor, list[Tensor]]:
    """gather_matmul, and at tp 1 what it would call if it did not know that there is nothing to gather."""
    if mesh.tp.size == 1 and mesh.overlap == "symm_mem":
        return overlap._fused_gather_matmul(x, matrices, mesh.tp)
    if mesh.tp.size == 1 and mesh.overlap == "chunked":
        lengths = chunk_lengths(x.shape[0], x.shape[1], LEAST_ROWS)
        return overlap._chunked_gather_matmul(x, matrices, mesh.tp, lengths)
    return gather_matmul(x, matrices, mesh, least_rows=LEAST_ROWS)


def scatter(x: Tensor, matrix: Tensor, mesh: Mesh) -> Tensor:
    """matmul_scatter, and at tp 1 what it would call if it did not know that there is nothing to sum."""
    if mesh.tp.size == 1 and mesh.overlap == "symm_mem":
        return overlap._fused_matmul_scatter(x, matrix, mesh.tp)
    if mesh.tp.size == 1 and mesh.overlap == "chunked":
        lengths = chunk_lengths(x.shape[0], x.shape[1], LEAST_ROWS)
        return overlap._chunked_matmul_scatter(x, matrix, mesh.tp, lengths)
    return matmul_scatter(x, matrix, mesh, least_rows=LEAST_ROWS)


def part(x: Tensor, mesh: Mesh) -> Tensor:
    """This rank's tokens."""
    return x.chunk(mesh.tp.size, dim=1)[mesh.tp.rank]


@contextmanager
def fused_operators(how: str) -> Iterator[None]:
    """symm_mem's operators over gloo, as torch's "fallback" or as its "cuda" code; symmetric memory seems to be there.

    "cuda" is the code that a GPU runs, layouts and assertions included, but for the two loops that copy peers' memory.
    """
    pipelines = patch.multiple(
        torch_s, _pipelined_all_gather_and_consume=gather_and_consume, _pipelined_produce_and_all2all=produce_and_send
    )
    implementations = {
        "fallback": (torch_s._fused_all_gather_matmul_fallback, torch_s._fused_matmul_reduce_scatter_fallback),
        "cuda": (torch_s._fused_all_gather_matmul, torch_s._fused_matmul_reduce_scatter),
    }[how]
    with (
        patch.object(symmetric_memory, "missing", lambda group, device: ""),
        pipelines if how == "cuda" else nullcontext(),
        torch.library._scoped_library("symm_mem", "IMPL") as library,
    ):
        for name, implementation in zip((GATHER, SCATTER), implementations, strict=True):
            library.impl(name, implementation, "CPU")
        yield


def gather_and_consume(
    shard: Tensor, consumer: Callable[[Tensor, int], None], out: Tensor, group_name: str, out_needed: bool = True
) -> None:
    """What `_pipelined_all_gather_and_consume` is documented to do, with its own assertions."""
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    assert shard.is_contiguous()
    assert out.is_contiguous()
    assert out_needed
    parts = list(out.chunk(group.size()))
    dist.all_gather(parts, shard, group=group)
    for rank, part in enumerate(parts):
        consumer(part, rank)


def produce_and_send(producer: Callable[[int, Tensor], None], output: Tensor, group_name: str, **options: Any) -> None:
    """What `_pipelined_produce_and_all2all` is documented to do."""
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    assert not options.get("out_chunk_dim")
    mine = torch.empty_like(output)
    for rank, part in enumerate(mine.chunk(group.size())):
        producer(rank, part)
    dist.all_to_all_single(output, mine, group=group)
