"""A number of bytes that says what it is made of: the table that a user can check by hand."""

import math
from collections.abc import Iterable
from typing import NamedTuple

Factor = tuple[str, int]
"""What it counts, and how many there are."""


class Term(NamedTuple):
    """Some bytes of one rank, and the factors whose product they are."""

    name: str
    bytes: int
    factors: tuple[Factor, ...]

    def times(self, *factors: Factor) -> "Term":
        """As many times more, of which those that are one are not worth a word."""
        some = tuple(factor for factor in factors if factor[1] != 1)
        return self if not some else Term(self.name, self.bytes * math.prod(n for _, n in some), some + self.factors)

    def __str__(self) -> str:
        return " x ".join(f"{label} {number:,}" for label, number in self.factors)


def term(name: str, *factors: Factor) -> Term:
    """The bytes of a product."""
    return Term(name, math.prod(number for _, number in factors), factors)


def total(terms: Iterable[Term]) -> int:
    """Bytes of all of them."""
    return sum(one.bytes for one in terms)
