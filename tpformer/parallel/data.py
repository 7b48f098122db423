"""Data parallelism: gradients accumulate in fp32 buckets, which are summed over dp while backward still runs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpformer.collectives import Pending, start_all_reduce
from tpformer.mesh import Mesh
from tpformer.placement import placements, sum_partial


@dataclass
class _Bucket:
    buffer: Tensor
    missing: int  # parameters whose last gradient of this step has not come yet
    pending: Pending | None = None


class GradientBuckets:
    """The accumulated gradient of every parameter of a model, summed over its replicas and its partial copies.

    Backward hooks add each gradient into a flat buffer, fp32 (fp64 for fp64 parameters), and free it. In
    the step's last backward a bucket that is complete is all-reduced over dp at once, beside the rest of
    backward. Nothing is communicated by the earlier micro-batches. Source: arXiv 2006.15704.

    Use: for each micro-batch, `start(last=...)`, then `loss.backward()`; at the end `finish()`.
    Scale the loss by 1 / (micro-batches x dp), since sums are taken.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, bucket_bytes: int = 25 << 20):
        self._mesh = mesh
        self._placements = placements(model, mesh)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._views: dict[str, Tensor] = {}
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[str, int] = {}
        self._fresh: set[str] = set(named)  # accumulators that hold nothing of this step yet
        self._last = True
        self._launched = 0
        for group in _groups(named, bucket_bytes):
            self._add_bucket({name: named[name] for name in group})
        self._sizes = [bucket.missing for bucket in self._buckets]
        self._handles = [p.register_post_accumulate_grad_hook(self._hook(n)) for n, p in named.items()]

    def start(self, *, last: bool) -> None:
        """Before each micro-batch's backward: is it the step's last one?"""
        self._last = last

    def finish(self) -> dict[str, Tensor]:
        """The whole step's gradient of every parameter, by name; valid until the next step's first backward."""
        for name in self._fresh:  # parameters that took no part
            self._views[name].zero_()
        while self._launched < len(self._buckets):
            self._launch()
        for bucket, size in zip(self._buckets, self._sizes, strict=True):
            if bucket.pending is not None:
                bucket.pending.wait()
            bucket.pending, bucket.missing = None, size
        self._fresh, self._launched = set(self._views), 0
        sum_partial(self._views, self._placements, self._mesh.tp)
        return self._views

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _add_bucket(self, named: dict[str, nn.Parameter]) -> None:
        first = next(iter(named.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        buffer = torch.zeros(sum(p.numel() for p in named.values()), dtype=dtype, device=first.device)
        for (name, parameter), part in zip(
            named.items(), buffer.split([p.numel() for p in named.values()]), strict=True
        ):
            self._views[name] = part.view_as(parameter)
            self._bucket_of[name] = len(self._buckets)
        self._buckets.append(_Bucket(buffer, missing=len(named)))

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def accumulate(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if name in self._fresh:
                self._fresh.remove(name)
                self._views[name].copy_(parameter.grad)
            else:
                self._views[name].add_(parameter.grad)
            parameter.grad = None
            if self._last:
                self._buckets[self._bucket_of[name]].missing -= 1
                # in order, so that every rank issues the same collectives in the same order
                while self._launched < len(self._buckets) and not self._buckets[self._launched].missing:
                    self._launch()

        return accumulate

    def _launch(self) -> None:
        bucket = self._buckets[self._launched]
        bucket.pending = start_all_reduce(bucket.buffer, self._mesh.dp)
        self._launched += 1


def _groups(named: dict[str, nn.Parameter], bucket_bytes: int) -> list[list[str]]:
    """Parameter names in the order in which backward meets them, cut into buckets of one dtype."""
    groups: list[list[str]] = []
    size, dtype = 0, None
    for name, parameter in reversed(named.items()):
        if not groups or size >= bucket_bytes or parameter.dtype != dtype:
            groups.append([])
            size, dtype = 0, parameter.dtype
        groups[-1].append(name)
        size += 4 * parameter.numel()
    return groups
