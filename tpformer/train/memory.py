"""The memory of a step: its peak, and what it consists of."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryPeak:
    """What `measure_memory` has found; whole once its `with` is over."""

    def __init__(self) -> None:
        self.bytes = 0
        """The most that was alive at once of what the step made."""


@dataclass(frozen=True)
class MemoryReport:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """At their peak, with everything else that a step makes and drops."""

    @property
    def peak(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations


@contextmanager
def measure_memory(device: torch.device, *, elsewhere: Callable[[], int] = lambda: 0) -> Iterator[MemoryPeak]:
    """Measure the most bytes alive at once of what is made inside: `with measure_memory(device) as memory: step()`.

    CUDA: torch's peak, less what was allocated before. CPU: every storage that an operator returns, until it is
    freed; what an operator takes for itself, and storages resized by hand (FSDP2's), are not seen, and each operator
    takes some 10 us longer. elsewhere: on a CPU, bytes that stand for another memory at that moment and are left
    out, those of offloaded activations.
    The step before should be over: gradients, buffers and optimizer state that it made lazily would count.
    """
    memory = MemoryPeak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield memory
        memory.bytes = torch.cuda.max_memory_allocated(device) - before
    else:
        with _Live(memory, elsewhere):
            yield memory


def memory_report(
    memory: MemoryPeak, parameters: Iterable[Tensor], gradients: Iterable[Tensor], optimizer: Iterable[Tensor]
) -> MemoryReport:
    """Split a rank's memory: what lasts, by its tensors, and the peak of what the step made.

    The tensors are those that were there before the measured step, and on the device; each storage counts once, whole,
    for the first that names it.
    """
    counted: set[int] = set()
    sizes = (_storage_bytes(tensors, counted) for tensors in (parameters, gradients, optimizer))
    return MemoryReport(next(sizes), next(sizes), next(sizes), memory.bytes)


def memory_table(reports: Sequence[MemoryReport]) -> str:
    """MiB of every rank, in rank order, as a table for the terminal."""
    names = [field.name for field in fields(MemoryReport)] + ["peak"]
    lines = ["  ".join(["rank", *names]) + "  (MiB)"]
    for rank, report in enumerate(reports):
        sizes = (f"{getattr(report, name) / 2**20:{len(name)}.1f}" for name in names)
        lines.append("  ".join([f"{rank:4}", *sizes]))
    return "\n".join(lines)


@contextmanager
def snapshot(path: Path, device: torch.device) -> Iterator[None]:
    """Write torch's record of every allocation inside, and of who made it, for pytorch.org/memory_viz.

    Written also if the step fails, out of memory as a rule. Raises ValueError unless the device is CUDA.
    """
    if device.type != "cuda":
        raise ValueError(f"a memory snapshot needs a CUDA device, not {device.type}: only its allocator keeps a record")
    torch.cuda.memory._record_memory_history(max_entries=1_000_000, device=device)
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None, device=device)


def _storage_bytes(tensors: Iterable[Tensor], counted: set[int]) -> int:
    """Of the storages that are not yet counted; of a DTensor, its local one."""
    total = 0
    for x in tensors:
        local = x._local_tensor if hasattr(x, "_local_tensor") else x
        storage = local.untyped_storage()
        if storage._cdata not in counted:
            counted.add(storage._cdata)
            total += storage.nbytes()
    return total


class _Live(TorchDispatchMode):
    """Follows every storage that an operator makes until it is freed, and keeps the peak of their bytes."""

    def __init__(self, memory: MemoryPeak, elsewhere: Callable[[], int]):
        super().__init__()
        self._memory, self._elsewhere = memory, elsewhere
        self._bytes = 0
        self._followed: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # its local tensors come by next
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in given | self._followed:
                self._follow(storage)
        self._memory.bytes = max(self._memory.bytes, self._bytes - self._elsewhere())
        return out

    def _follow(self, storage: UntypedStorage) -> None:
        self._followed.add(storage._cdata)
        self._bytes += storage.nbytes()
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, name: int, size: int) -> None:
        self._followed.discard(name)
        self._bytes -= size


def _storages(tree: Any) -> Iterator[UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()
        elif isinstance(leaf, UntypedStorage):
            yield leaf
