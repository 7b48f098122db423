"""Where this rank's part of a parameter lies in the tensors of a file, whatever the layout that wrote it.

Files hold whole tensors under a family's names (Hugging Face's). What a rank holds of one of ours is, in each of
theirs, a few boxes: a range along each dim. Reading, writing, checksums and conversion all go by boxes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tpformer.placement import Placement

Rows = np.ndarray
"""Numbers of rows, int64."""


@dataclass(frozen=True)
class Kept:
    """Under which names a parameter is kept, and which of its rows are whose.

    name: ours. tensors: theirs, each of which takes some of our rows. split: from the numbers of our rows to those of
    each of theirs, in its order (einops says how they are fused); None: one tensor, as it is. transposed: theirs is
    (in, out) where ours is (out, in).
    """

    name: str
    tensors: tuple[str, ...]
    split: Callable[[Rows], tuple[Rows, ...]] | None = None
    transposed: bool = False

    def prefixed(self, prefix: str) -> "Kept":
        """The same under other names: an optimizer's state lies as its weight does."""
        return replace(self, tensors=tuple(prefix + tensor for tensor in self.tensors))

    def rows(self, count: int) -> tuple[Rows, ...]:
        """For each of their tensors, which of our `count` rows it has, in its order."""
        numbers = np.arange(count)
        return (numbers,) if self.split is None else self.split(numbers)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The whole shape of each of their tensors, of a parameter of this whole shape."""
        if not shape:
            return dict.fromkeys(self.tensors, ())
        whole = ((len(rows), *shape[1:]) for rows in self.rows(shape[0]))
        return {
            tensor: sizes[::-1] if self.transposed else sizes for tensor, sizes in zip(self.tensors, whole, strict=True)
        }


@dataclass(frozen=True)
class Box:
    """[start, start + size) along each dim of their `tensor`, and where that is in this rank's part of ours.

    rows: of the local part, in the box's order. columns: indices into its other dims. copy: another rank has the
    same box, and counts.
    """

    tensor: str
    start: tuple[int, ...]
    size: tuple[int, ...]
    rows: slice | Tensor | None
    columns: tuple[slice, ...]
    transposed: bool
    copy: bool

    @property
    def index(self) -> tuple[slice, ...]:
        """The box, as an index into their whole tensor."""
        return tuple(slice(first, first + length) for first, length in zip(self.start, self.size, strict=True))

    def take(self, local: Tensor) -> Tensor:
        """The box's numbers, (*size), out of this rank's part; maybe a view of it."""
        if self.rows is None:
            return local
        part = local[(self.rows, *self.columns)]
        return part.t() if self.transposed else part

    def put(self, local: Tensor, part: Tensor) -> None:
        """Write a box's numbers, (*size), into this rank's part, rounded to its dtype."""
        if self.rows is None:
            local.copy_(part)
        else:
            local[(self.rows, *self.columns)] = (part.t() if self.transposed else part).to(local)


def boxes(kept: Kept, placement: Placement) -> Iterator[Box]:
    """What this rank holds of a parameter, as boxes of their tensors; padding is in none."""
    if not placement.shape:
        alone = placement.pieces[0].copy == 0 and placement.counts
        yield Box(kept.tensors[0], (), (), None, (), False, not alone)
        return
    rows_of = kept.rows(placement.shape[0])
    for piece, whole, local in placement.slices():
        first, last, _ = whole[0].indices(placement.shape[0])
        begin = local[0].start or 0
        columns = [index.indices(n) for index, n in zip(whole[1:], placement.shape[1:], strict=False)]
        columns += [(0, n, 1) for n in placement.shape[1 + len(columns) :]]
        for tensor, rows in zip(kept.tensors, rows_of, strict=True):
            mine = np.flatnonzero((rows >= first) & (rows < last))  # of theirs, ascending
            for run in np.split(mine, np.flatnonzero(np.diff(mine) > 1) + 1):
                if not len(run):
                    continue
                start = (int(run[0]), *(a for a, _, _ in columns))
                size = (len(run), *(b - a for a, b, _ in columns))
                turned = kept.transposed
                yield Box(
                    tensor,
                    start[::-1] if turned else start,
                    size[::-1] if turned else size,
                    _index(rows[run] - first + begin),
                    tuple(local[1:]),
                    turned,
                    bool(piece.copy) or not placement.counts,
                )


def _index(rows: Rows) -> slice | Tensor:
    """Numbers of rows as the cheapest index: a slice where they are evenly spaced."""
    steps = np.diff(rows)
    if len(rows) == 1 or (steps[0] > 0 and (steps == steps[0]).all()):
        step = int(steps[0]) if len(rows) > 1 else 1
        return slice(int(rows[0]), int(rows[-1]) + 1, step)
    return torch.from_numpy(rows)
