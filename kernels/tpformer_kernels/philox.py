"""Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11) in plain torch."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(key: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four tensors of 32-bit words (held in int64) for four broadcastable int64 counter words below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c0, 0xD2511F53), _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.broadcast_tensors(c0, c1, c2, c3)


def _product(c: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of the product of two unsigned 32-bit words."""
    if torch.compiler.is_compiling():
        # a compiler's C++ may do anything with a signed product beyond 2^63: two that stay below 2^48
        upper, lower = c * (factor >> 16), c * (factor & 0xFFFF)
        return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _MASK
    product = c * factor  # eager ones wrap modulo 2^64, so that both halves are exact
    return (product >> 32) & _MASK, product & _MASK


def random_columns(key: int, rows: tuple[Tensor, Tensor, Tensor], start: int, stop: int) -> Tensor:
    """Random 32-bit words (int64) for columns [start, stop) of each row.

    rows: three int64 index tensors below 2^32 that broadcast to the leading shape (*r) -> (*r, stop - start).
    Column c of a row is word c % 4 of Philox counter (c // 4, *row): a slice equals the slice of the whole.
    """
    first = start // 4
    blocks = torch.arange(first, (stop + 3) // 4, device=rows[0].device)
    c1, c2, c3 = (r.unsqueeze(-1) for r in rows)
    words = torch.stack(philox(key, (blocks, c1, c2, c3)), dim=-1).flatten(-2)
    return words[..., start - 4 * first : stop - 4 * first]
