"""What this rank writes: chunks of whole tensors, each with the numbers that belong there."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tpformer.checkpoint.boxes import Box, Kept, boxes
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
    """The chunks that this rank is to write, with the numbers of when they are asked: of equal copies one rank's."""
    return [chunk(part, box) for part in parts for box in boxes(part.kept, part.placement) if not box.copy]


def chunk(part: Part, box: Box) -> Chunk:
    """One of a part's boxes."""
    shape = part.kept.shapes(part.placement.shape)[box.tensor]
    take = partial(box.take, part.local)
    return Chunk(part.key(box.tensor), shape, box.start, box.size, part.dtype or part.local.dtype, take)


Slot = tuple[Box, Tensor, Chunk]
"""A box, host memory for its numbers, and the chunk that has these."""


class Staging:
    """Host memory that the parts of one model are copied to, again and again (pinned, where they are on a GPU)."""

    def __init__(self) -> None:
        self._slots: dict[tuple[tuple[str, ...], Placement], list[Slot]] = {}

    def copy(self, parts: Iterable[Part]) -> list[Chunk]:
        """The chunks that this rank is to write, with the numbers of now; they are valid until the next copy."""
        found, on_gpu = [], False
        for part in parts:
            key = part.kept.tensors, part.placement
            if key not in self._slots:  # where everything belongs takes longer to work out than to copy
                self._slots[key] = list(_slots(part))
            for box, memory, staged in self._slots[key]:
                memory.copy_(box.take(part.local.detach()), non_blocking=True)
                found.append(staged)
            on_gpu = on_gpu or part.local.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        return found


def _slots(part: Part) -> Iterator[Slot]:
    for box in boxes(part.kept, part.placement):
        if not box.copy:
            memory = torch.empty(box.size, dtype=part.dtype or part.local.dtype, pin_memory=part.local.is_cuda)
            yield box, memory, replace(chunk(part, box), take=partial(_same, memory))


def _same(x: Tensor) -> Tensor:
    return x
