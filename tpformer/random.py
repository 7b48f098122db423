"""Random numbers by global index: any rank draws exactly its own part, the same whatever the layout.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11) maps a 64-bit key
and a 128-bit counter to four 32-bit words. The counter is a *global* position, so there is no state to
fork, save or restore: initial weights and dropout masks do not depend on the number of ranks.
"""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Key:
    """A named place in the space of random numbers.

    `fold` derives the key of a step, a layer, a use. `sample` is the global number of the first sample of
    this process's batch, so that data-parallel replicas draw different parts of one mask.
    """

    seed: int
    sample: int = 0

    def fold(self, *names: str | int) -> "Key":
        """The key of a place below this one; the same names give the same key on every rank."""
        text = "/".join([str(self.seed), *map(str, names)])
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return replace(self, seed=int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class TracedKey:
    """A Key inside torch.compile, where numbers are part of a program and tensors are not: int64, on the CPU.

    The same bits, and so the same masks; the key of another step is no other program.
    """

    seed: Tensor
    sample: Tensor

    @staticmethod
    def of(key: Key) -> "TracedKey":
        """A key's; outside of what is compiled."""
        return TracedKey(_as_tensor(key.seed), _as_tensor(key.sample))

    def fold(self, *names: str | int) -> "TracedKey":
        """As Key.fold."""
        return replace(self, seed=fold_seed(self.seed, "/".join(map(str, names))))


@torch.library.custom_op("tpformer_random::fold_seed", mutates_args=())
def fold_seed(seed: Tensor, names: str) -> Tensor:
    """Key.fold as an operator, into which torch.compile does not look; int64 () -> int64 ()."""
    return _as_tensor(Key(int(seed) % 2**64).fold(names).seed)


@fold_seed.register_fake
def _(seed: Tensor, names: str) -> Tensor:
    return torch.empty_like(seed)


def _as_tensor(n: int) -> Tensor:
    """The signed 64 bits of a number below 2^64."""
    return torch.tensor(n - (n >> 63 << 64), dtype=torch.int64, device="cpu")


def uniform(words: Tensor) -> Tensor:
    """Numbers in (0, 1), fp64, from 32-bit words: the middle of one of 2^32 equal intervals."""
    return (words.double() + 0.5) * 2.0**-32


def normal(words: Tensor) -> Tensor:
    """Standard normal numbers, fp64, from 32-bit words, through the inverse of the normal distribution."""
    return torch.special.ndtri(uniform(words))
