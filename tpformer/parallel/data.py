"""Data parallelism: gradients accumulate in fp32 buckets, which are summed over dp while backward still runs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tpformer.collectives import Pending, start_all_reduce
from tpformer.layers.gradient_sum import GradientSum, set_gradient_sum
from tpformer.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpformer.mesh import Mesh
from tpformer.placement import placements, sum_partial


@dataclass
class _Bucket:
    buffer: Tensor
    names: tuple[str, ...]
    missing: set[str]  # parameters whose last gradient of this step has not come yet
    pending: Pending | None = None


class GradientBuckets:
    """The accumulated gradient of every parameter of a model, summed over its replicas and its partial copies.

    Linear layers add the gradient of their weight into a flat buffer, fp32 (fp64 for fp64 parameters), by the matmul
    that computes it (bf16 on a CPU and torch.compile apart); backward hooks add every other gradient, and free it. In
    the step's last backward a bucket that is complete is all-reduced over dp at once, beside the rest of backward.
    Nothing is communicated by the earlier micro-batches. Source: arXiv 2006.15704.

    Use: for each micro-batch, `start(last=...)`, then `loss.backward()`; at the end `finish()`.
    Scale the loss by 1 / (micro-batches x dp), since sums are taken. Until `close()`, torch.autograd.grad finds no
    gradient of linear layers' weights: it too is added to the sum.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, bucket_bytes: int = 25 << 20):
        self._mesh = mesh
        self._placements = placements(model, mesh)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._sums: dict[str, GradientSum] = {}
        self._buckets: list[_Bucket] = []
        self._handles: list[RemovableHandle] = []
        self._last = True
        self._launched = 0
        for group in _groups(named, bucket_bytes):
            self._add_bucket({name: named[name] for name in group})
        self._direct = {name: p for name, p in _linear_weights(model).items() if self._takes_products(name, p)}
        for name, weight in self._direct.items():
            set_gradient_sum(weight, self._sums[name])

    def start(self, *, last: bool) -> None:
        """Before each micro-batch's backward: is it the step's last one?"""
        self._last = last

    def postpone(self, waiting: list[Callable[[], None]] | None) -> None:
        """Put the gradients of linear layers' weights there, to be computed when called; None: compute them at once."""
        for name in self._direct:
            self._sums[name].waiting = waiting

    def finish(self) -> dict[str, Tensor]:
        """The whole step's gradient of every parameter, by name; valid until the next step's first backward."""
        views = {name: gradient.total for name, gradient in self._sums.items()}
        for gradient in self._sums.values():
            if gradient.empty:  # the parameter took no part
                gradient.total.zero_()
        while self._launched < len(self._buckets):
            self._launch()
        for bucket in self._buckets:
            if bucket.pending is not None:
                bucket.pending.wait()
            bucket.pending, bucket.missing = None, set(bucket.names)
        for gradient in self._sums.values():
            gradient.restart()
        self._launched = 0
        sum_partial(views, self._placements, self._mesh.tp)
        return views

    def buffers(self) -> list[Tensor]:
        """The memory that gradients lie in from step to step."""
        return [bucket.buffer for bucket in self._buckets]

    def nbytes(self) -> int:
        """Bytes of this rank's gradients."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        for weight in self._direct.values():
            set_gradient_sum(weight, None)
        self._direct = {}

    def _takes_products(self, name: str, weight: nn.Parameter) -> bool:
        """No CPU multiplies bf16 and sums in fp32: there autograd's bf16 gradient is added."""
        return name in self._sums and (weight.is_cuda or weight.dtype == self._sums[name].total.dtype)

    def _add_bucket(self, named: dict[str, nn.Parameter]) -> None:
        first = next(iter(named.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        buffer = torch.zeros(sum(p.numel() for p in named.values()), dtype=dtype, device=first.device)
        bucket = _Bucket(buffer, tuple(named), set(named))
        parts = buffer.split([p.numel() for p in named.values()])
        for (name, parameter), part in zip(named.items(), parts, strict=True):
            self._sums[name] = GradientSum(part.view_as(parameter))
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._hook(bucket, name)))
        self._buckets.append(bucket)

    def _hook(self, bucket: _Bucket, name: str) -> Callable[[Tensor], None]:
        """Runs once a backward, after every use of the parameter, also if linear layers have added all there is."""

        def accumulate(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self._sums[name].add(parameter.grad)
                parameter.grad = None
            self._complete(bucket, name)

        return accumulate

    def _complete(self, bucket: _Bucket, name: str) -> None:
        """A parameter's gradient of this micro-batch is whole; if it is the last one, send what can be sent."""
        if not self._last:
            return
        bucket.missing.discard(name)
        # in order, so that every rank issues the same collectives in the same order
        while self._launched < len(self._buckets) and not self._buckets[self._launched].missing:
            self._launch()

    def _launch(self) -> None:
        bucket = self._buckets[self._launched]
        for name in bucket.names:
            self._sums[name].closed = self._mesh.dp.size > 1  # otherwise it stays here, and may take more
        bucket.pending = start_all_reduce(bucket.buffer, self._mesh.dp)
        self._launched += 1


def _linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of linear layers, by name."""
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear))
    return {f"{name}.weight".lstrip("."): layer.weight for name, layer in layers}


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
