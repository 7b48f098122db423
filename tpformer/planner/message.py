"""A kind of collective that a rank issues in a step: what it carries, and how often."""

from dataclasses import dataclass
from math import prod

Factors = tuple[tuple[str, int], ...]
"""Labels and numbers, to be multiplied."""


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind, as `tpformer.trace` would name and count them."""

    op: str
    """all_reduce, all_gather, reduce_scatter, send or recv."""
    axis: str
    """Of the mesh: tp, dp, dp_shard, dp_replicate, pp or world."""
    dtype: str
    phase: str
    """forward or backward; what comes after backward, as the sum of partial gradients, counts as forward."""
    what: str
    hidden: bool
    """Whether it runs beside computation."""
    factors: Factors
    """Of the bytes of one call."""
    call_factors: Factors
    """Of the calls in a step."""

    @property
    def bytes(self) -> int:
        """Payload of one call: the unsharded side."""
        return prod(number for _, number in self.factors)

    @property
    def calls(self) -> int:
        """In one step."""
        return prod(number for _, number in self.call_factors)

    @property
    def total(self) -> int:
        """Bytes of a step."""
        return self.bytes * self.calls

    def sent(self, size: int) -> int:
        """Bytes that this rank sends in a step by ring algorithms over an axis of that size, at least; whole bytes.

        Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms (JPDC 2009): an all-reduce is a
        reduce-scatter and an all-gather, each (n - 1)/n of the payload.
        """
        if self.op in ("send", "recv"):
            return self.total if self.op == "send" else 0
        passes = 2 if self.op == "all_reduce" else 1
        return self.calls * -(-passes * (size - 1) * self.bytes // size)


WIDTHS = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Of a precision's name."""
