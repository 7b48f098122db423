"""The plain Llama on several replicas, by what torch itself offers: DistributedDataParallel and FSDP2."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.plain import PlainLlama


class LossModule(nn.Module):
    """Its forward is the loss, which is what wrappers want to wrap."""

    def __init__(self, model: PlainLlama):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """int64 (b, s) twice -> mean nats per token."""
        return self.model.loss(tokens, targets)


def data_parallel(model: PlainLlama, group: dist.ProcessGroup | None) -> nn.Module:
    """Every replica has all of it; gradients are averaged while backward runs."""
    # as views: gradients are not copied out of the buckets, the faster way
    return DistributedDataParallel(LossModule(model), process_group=group, gradient_as_bucket_view=True)


def fully_sharded(model: PlainLlama, mesh: DeviceMesh) -> nn.Module:
    """Parameters shared out by block, the ends as one."""
    whole: Any = LossModule(model)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(whole, mesh=mesh)
