"""How many parameters a rank has, of their shapes."""

from functools import lru_cache
from math import prod
from typing import NamedTuple

from tpformer.models.decoder import Part
from tpformer.planner.candidate import ModelConfig
from tpformer.planner.shapes import Shapes, block_shapes, end_shapes


class Weight(NamedTuple):
    """A parameter as one tp rank has it, or that of several blocks; a vector has one column."""

    name: str
    rows: int
    columns: int = 1
    times: int = 1

    def numbers(self, shards: int = 1) -> int:
        """Numbers on the replica that has most, where `shards` of them share out the rows (as torch.chunk does)."""
        return -(-self.rows // shards) * self.columns * self.times


@lru_cache(maxsize=4096)
def block_weights(model: ModelConfig, tp: int) -> tuple[Weight, ...]:
    """The parameters of a block, by name below it; every tp rank has as many."""
    return _weights(block_shapes(model, tp))


@lru_cache(maxsize=4096)
def end_weights(model: ModelConfig, tp: int, first: bool, last: bool) -> tuple[Weight, ...]:
    """The parameters beside the blocks, of a part that has the first stage, the last one, both or neither."""
    before, after = end_shapes(model, tp, first, last)
    return _weights(before) + _weights(after)


def _weights(shapes: Shapes) -> tuple[Weight, ...]:
    return tuple(Weight(name, shape[0], prod(shape[1:])) for name, shape in shapes.items())


def part_weights(model: ModelConfig, tp: int, part: Part) -> tuple[Weight, ...]:
    """All parameters of a part of a model."""
    blocks = (w._replace(name=f"blocks.{w.name}", times=w.times * len(part.layers)) for w in block_weights(model, tp))
    return (*blocks, *end_weights(model, tp, part.first, part.last))


def numbers(weights: tuple[Weight, ...], shards: int = 1) -> int:
    """Numbers of all of them on the replica that has most."""
    return sum(weight.numbers(shards) for weight in weights)
