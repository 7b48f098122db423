"""What this rank writes: chunks of whole tensors, each with the numbers that belong there."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tpformer.checkpoint.boxes import Kept, boxes
from tpformer.placement import Placement


@dataclass(frozen=True)
class Part:
    """What this rank holds of a parameter, or of something that lies as it does, and where that is kept.

    folder: of the tensors' files in the checkpoint; "" is the checkpoint itself. dtype: in the files; None: its own.
    """

    kept: Kept
    placement: Placement
    local: Tensor
    folder: str = ""
    dtype: torch.dtype | None = None

    def key(self, tensor: str) -> str:
        """The name of one of its tensors in the whole checkpoint."""
        return f"{self.folder}/{tensor}" if self.folder else tensor


@dataclass(frozen=True)
class Chunk:
    """[start, start + size) along each dim of a whole tensor of this `shape`; take() gives its numbers, (*size)."""

    key: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    take: Callable[[], Tensor]

    def numbers(self) -> Tensor:
        """Its numbers in host memory, contiguous; maybe a view."""
        return self.take().detach().to("cpu", self.dtype).contiguous()


def chunks(parts: Iterable[Part]) -> list[Chunk]:
    """The chunks that this rank is to write: of equal copies only one rank has any."""
    found = []
    for part in parts:
        shapes = part.kept.shapes(part.placement.shape)
        dtype = part.dtype or part.local.dtype
        for box in boxes(part.kept, part.placement):
            if not box.copy:
                take = partial(box.take, part.local)
                found.append(Chunk(part.key(box.tensor), shapes[box.tensor], box.start, box.size, dtype, take))
    return found


class Staging:
    """Host memory that chunks are copied to, kept from one time to the next (pinned, where they are on a GPU)."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def copy(self, found: list[Chunk]) -> list[Chunk]:
        """The same chunks with their numbers of now; they are valid until the next copy."""
        copied, on_gpu = [], False
        for chunk in found:
            numbers = chunk.take().detach()
            memory = self._memory.get((chunk.key, chunk.start))
            if memory is None:
                memory = torch.empty(chunk.size, dtype=chunk.dtype, pin_memory=numbers.is_cuda)
                self._memory[chunk.key, chunk.start] = memory
            memory.copy_(numbers, non_blocking=True)
            on_gpu = on_gpu or numbers.is_cuda
            copied.append(replace(chunk, take=partial(_same, memory)))
        if on_gpu:
            torch.cuda.synchronize()
        return copied


def _same(x: Tensor) -> Tensor:
    return x
