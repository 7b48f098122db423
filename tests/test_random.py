"""Random numbers by index: Random123's published vectors, slices of the whole, and the distributions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tpformer import Key
from tpformer.random import TracedKey, normal, uniform
from tpformer_kernels import philox, random_columns

# https://github.com/DEShawResearch/random123, tests/kat_vectors: philox4x32, 10 rounds
KNOWN = {  # counter, key (two words) -> four words
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}


def hexadecimal(words: str) -> list[int]:
    return [int(word, 16) for word in words.split()]


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name: str) -> None:
    counter, key, expected = map(hexadecimal, KNOWN[name])
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    assert [int(word) for word in philox(key[0] | key[1] << 32, (c0, c1, c2, c3))] == expected


def scalar_philox(key: int, counter: list[int]) -> list[int]:
    """The same in Python's integers, straight from the paper."""
    c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_words_are_philox_of_the_row_and_the_column() -> None:
    """The documented counter: word c % 4 of (c // 4, *row); keys of 64 bits."""
    key = Key(0xFEDCBA9876543210)
    rows = (torch.tensor([[7], [2**32 - 1]]), torch.tensor([3, 0, 9]), torch.tensor(5))
    words = random_columns(key.seed, rows, 0, 9)
    assert words.shape == (2, 3, 9)
    for i, r0 in enumerate((7, 2**32 - 1)):
        for j, r1 in enumerate((3, 0, 9)):
            assert words[i, j].tolist() == [scalar_philox(key.seed, [c // 4, r0, r1, 5])[c % 4] for c in range(9)]


def row(start: int, stop: int, key: Key = Key(1)) -> Tensor:
    zero = torch.zeros(1, dtype=torch.int64)
    return random_columns(key.seed, (zero, zero, zero), start, stop)[0]


def test_every_slice_is_a_slice_of_the_whole() -> None:
    whole = row(0, 24)
    assert len(set(whole.tolist())) == 24
    for start in range(12):
        for stop in range(start + 1, 24):
            assert torch.equal(row(start, stop), whole[start:stop]), (start, stop)


def test_rows_keys_and_row_dims_differ() -> None:
    a, b, zero = torch.arange(3), torch.arange(3) + 1, torch.zeros(3, dtype=torch.int64)
    streams = [
        random_columns(key.seed, rows, 0, 64) for key in (Key(1), Key(2)) for rows in ((a, zero, b), (b, zero, a))
    ]
    streams += [random_columns(Key(1).seed, rows, 0, 64) for rows in ((zero, a, b), (a, b, zero))]
    assert len({tuple(words[2].tolist()) for words in streams}) == 6
    assert len({tuple(line.tolist()) for line in streams[0]}) == 3
    assert torch.equal(random_columns(Key(1).seed, (a, zero, b), 0, 64), streams[0])


def test_uniform_never_reaches_its_ends() -> None:
    ends = uniform(torch.tensor([0, 2**32 - 1]))
    assert ends.dtype == torch.float64
    assert ends.tolist() == [2.0**-33, 1 - 2.0**-33]
    assert torch.isfinite(normal(torch.tensor([0, 2**32 - 1]))).all()


def kolmogorov_smirnov(sample: Tensor, distribution: Tensor) -> float:
    """sqrt(n) times the largest distance of two distribution functions, of a sorted sample."""
    expected, n = distribution.numpy(), len(sample)
    steps = np.arange(n + 1) / n
    return float(n**0.5 * max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max()))


BEYOND_CHANCE = 2.47  # P(Kolmogorov > 2.47) = 1e-5


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5])
def test_uniform_and_normal_have_their_distributions(seed: int) -> None:
    words = row(0, 40_000, Key(seed))
    drawn = uniform(words).sort().values
    assert kolmogorov_smirnov(drawn, drawn) < BEYOND_CHANCE
    z = normal(words).sort().values
    assert kolmogorov_smirnov(z, torch.special.ndtr(z)) < BEYOND_CHANCE
    assert kolmogorov_smirnov(z, torch.special.ndtr(1.05 * z)) > BEYOND_CHANCE  # it would see 5 % in the width
    n = len(z)
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # variances of the powers
        assert abs((z**power).mean() - moment) < 5 * math.sqrt(spread / n)


def test_neighbours_are_uncorrelated() -> None:
    zero = torch.zeros(64, dtype=torch.int64)
    z = normal(random_columns(Key(4).seed, (torch.arange(64), zero, zero), 0, 512))
    bound = 5 / z.numel() ** 0.5
    for shift in (1, 2, 3, 4, 5):
        assert abs((z[:, shift:] * z[:, :-shift]).mean()) < bound
        assert abs((z[shift:] * z[:-shift]).mean()) < bound
    assert abs((z * normal(random_columns(Key(5).seed, (torch.arange(64), zero, zero), 0, 512))).mean()) < bound


def test_every_bit_is_fair() -> None:
    words = row(0, 20_000)
    for bit in range(32):
        assert abs(((words >> bit) & 1).double().mean() - 0.5) < 5 * 0.5 / len(words) ** 0.5
    assert words.max() < 2**32
    assert words.min() >= 0


def test_folding_names_places() -> None:
    key = Key(3)
    folded = [
        key.fold("a"),
        key.fold("b"),
        key.fold("a", 1),
        key.fold("a").fold(1),
        key.fold("a", 11),
        Key(4).fold("a"),
    ]
    assert len({k.seed for k in folded} | {key.seed}) == 7
    assert key.fold("a", 1) == key.fold("a", 1)
    assert key == Key(3)
    assert all(0 <= k.seed < 2**64 for k in folded)


def test_folding_is_the_same_in_every_process_and_release() -> None:
    """A checkpoint's masks and weights must not change: the value is pinned, and Python's salted hash not used."""
    assert Key(0).fold("init", "embedding.weight").seed == 2538674762177601740


def test_folding_keeps_the_sample() -> None:
    assert Key(3, sample=8).fold("a") == replace(Key(3).fold("a"), sample=8)


def test_a_traced_key_folds_to_the_same_bits() -> None:
    """As signed numbers: for seeds on both sides of 2^63, and names of both kinds."""
    for seed in (0, 3, 2**63 - 1, 2**63, 2**64 - 1):
        key = Key(seed, sample=8)
        traced, folded = TracedKey.of(key).fold("a", 1).fold("b"), key.fold("a", 1).fold("b")
        assert int(TracedKey.of(key).seed) % 2**64 == seed
        assert int(traced.seed) % 2**64 == folded.seed
        assert int(traced.sample) == folded.sample
