"""Torch's fused operators on CPU tensors: the real ones know GPUs only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as torch_s

from tpformer import symmetric_memory

GATHER, SCATTER = "fused_all_gather_matmul", "fused_matmul_reduce_scatter"


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
