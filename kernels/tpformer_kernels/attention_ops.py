"""Attention's launches as operators of torch, and how many operations torch's counter sees in them."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from tpformer_kernels.attention_dkdv_kernel import attention_dkdv_kernel
from tpformer_kernels.attention_dq_kernel import attention_delta_kernel, attention_dq_kernel
from tpformer_kernels.attention_kernels import attention_forward_kernel
from tpformer_kernels.dropout import signed, threshold
from tpformer_kernels.jit import triton
from tpformer_kernels.library import launch, operator
from tpformer_kernels.tables import options


class Settings(NamedTuple):
    """AttentionOptions as an operator takes them; the seed as a signed number."""

    causal: bool
    scale: float
    window: int | None
    softcap: float
    dropout: float
    seed: int
    sample: int
    head: int
    drawn: Tensor | None = None
    """Seed and sample in place of those numbers, int64 (2); see drawn_at."""

    def known(self) -> "Settings":
        """With seed and sample as numbers."""
        if self.drawn is None:
            return self
        seed, sample = self.drawn.tolist()
        return self._replace(seed=seed, sample=sample, drawn=None)


SETTINGS = (
    "bool causal, float scale, int? window, float softcap, float dropout, int seed, int sample, int head, Tensor? drawn"
)
"""The same in torch's schema language."""


def _empty_forward(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _empty_backward(do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, with_q, with_kv = others
    dq = _empty_heads(q) if with_q else q.new_empty(0)
    return dq, *(_empty_heads(k) if with_kv else k.new_empty(0) for _ in range(2))


def _empty_heads(x: Tensor) -> Tensor:
    """Memory for heads (b, heads, s, d) of which a token's lie side by side, as the projections have them."""
    b, heads, s, d = x.shape
    return x.new_empty(b, s, heads, d).transpose(1, 2)


@operator(
    f"attention_forward(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cu_seqlens, {SETTINGS})"
    " -> (Tensor o, Tensor lse)",
    _empty_forward,
)
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    """o (b, heads, sq, d) and the log of the sums (b, heads, sq), fp32."""
    o, lse = _empty_forward(q)
    q, k, v = _with_rows(q, k, v)
    key_mask = _as_bytes(key_mask)
    chosen = Settings(*settings).known()
    numbers, flags = _arguments(q, k, key_mask, chosen)
    del numbers["scale"]
    meta = _options("attention_forward", q, chosen)
    tiles, grid = _tiles(q, meta["BLOCK_M"], cu_seqlens)
    pointers = (q, k, v, o, lse, key_mask, tiles)
    launch(attention_forward_kernel, grid, *pointers, *_strides(q, k, v, o), **numbers, **flags, **meta)
    return o, lse


@operator(
    "attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? key_mask,"
    f" Tensor? cu_seqlens, {SETTINGS}, bool with_q, bool with_kv) -> (Tensor dq, Tensor dk, Tensor dv)",
    _empty_backward,
)
def attention_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    """dq, dk and dv, shaped like q, k and v; empty where with_q or with_kv is False."""
    key_mask, cu_seqlens, *settings, with_q, with_kv = others
    dq, dk, dv = _empty_backward(do, dlse, q, k, with_q, with_kv)
    q, k, v, do, o = _with_rows(q, k, v, do, o)
    lse, key_mask = lse.contiguous(), _as_bytes(key_mask)
    delta = _delta(do, o, lse, dlse)
    chosen = Settings(*settings).known()
    numbers, flags = _arguments(q, k, key_mask, chosen)
    pointers = (q, k, v, do, lse, delta)
    if with_kv:
        meta = _options("attention_dkdv", q, chosen)
        tiles, grid = _tiles(k, meta["BLOCK_N"], cu_seqlens)
        arguments = (*pointers, dk, dv, key_mask, tiles, *_strides(q, k, v, do, dk))
        launch(attention_dkdv_kernel, grid, *arguments, **numbers, **flags, **meta)
    if with_q:
        meta = _options("attention_dq", q, chosen)
        tiles, grid = _tiles(q, meta["BLOCK_M"], cu_seqlens)
        arguments = (*pointers, dq, key_mask, tiles, *_strides(q, k, v, do, dq))
        launch(attention_dq_kernel, grid, *arguments, **numbers, **flags, **meta)
    return dq, dk, dv


def _delta(do: Tensor, o: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """rowsum(do · o) - dlse, (b, heads, sq) in fp32."""
    delta = torch.empty_like(lse)
    dlse = None if dlse is None else dlse.contiguous()
    meta = options("attention_delta", o.shape[3], o.device)
    grid = (triton.cdiv(o.shape[2], meta["BLOCK_ROWS"]), o.shape[1], o.shape[0])
    arguments = (do, o, lse, dlse, delta, *_strides(do, o), o.shape[2])
    launch(attention_delta_kernel, grid, *arguments, **_widths(o), **meta)
    return delta


def _with_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same with contiguous rows, wherever they lie; a copy only of those that have none."""
    return tuple(x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in tensors)


def _as_bytes(key_mask: Tensor | None) -> Tensor | None:
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def _options(kernel: str, q: Tensor, settings: Settings) -> dict[str, int]:
    """fp32 has no use of tensor cores; beside dropout or a soft cap there are registers for small tiles only."""
    small = "_small" if settings.dropout or settings.softcap else ""
    return options(kernel + ("_fp32" if q.dtype == torch.float32 else small), q.shape[3], q.device)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _widths(x: Tensor) -> dict[str, int]:
    return {"HEAD_DIM": x.shape[3], "BLOCK_D": max(16, triton.next_power_of_2(x.shape[3]))}


def _arguments(
    q: Tensor, k: Tensor, key_mask: Tensor | None, settings: Settings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a kernel takes by name: numbers, and flags that are compiled in."""
    s, longest = settings, max(q.shape[2], k.shape[2])
    log2e = math.log2(math.e)
    # every number within 32 bits, so that each value is launched by the same machine code
    words = [signed(n & 0xFFFFFFFF, 32) for n in (s.seed, s.seed >> 32, threshold(s.dropout), s.sample, s.head)]
    numbers = {
        "mask_stride": 0 if key_mask is None else key_mask.stride(0),
        "queries": q.shape[2],
        "keys": k.shape[2],
        "group": q.shape[1] // k.shape[1],
        "scale": s.scale,
        "inner": s.scale / s.softcap if s.softcap else 0.0,
        "unit": (s.softcap or s.scale) * log2e,
        "window": min(s.window or longest, longest),
        **dict(zip(("seed_low", "seed_high", "threshold", "sample", "head"), words, strict=True)),
        "keep_scale": 1 / (1 - s.dropout),
    }
    flags = {
        "CAUSAL": s.causal,
        "WINDOW": s.window is not None and s.window < longest,
        "SOFTCAP": s.softcap > 0,
        "DROPOUT": s.dropout > 0,
    }
    return numbers, flags | _widths(q)


def _tiles(x: Tensor, block: int, cu_seqlens: Tensor | None) -> tuple[Tensor | None, tuple[int, ...]]:
    """The grid over tiles of x (b, heads, s, d), and for packed sequences what each tile is; see tile_place."""
    batch, heads, length, _ = x.shape
    if cu_seqlens is None:
        return None, (triton.cdiv(length, block), heads, batch)
    first = cu_seqlens[:-1]
    lengths = cu_seqlens.diff()
    tiles = (lengths + block - 1) // block
    ends = tiles.cumsum(0)
    # as many programs as there can be tiles, without asking the device; the last may have a sequence of length 0
    program = torch.arange(length // block + len(first), device=x.device)
    sequence = torch.searchsorted(ends, program, right=True)
    there = sequence < len(first)
    sequence = sequence.clamp(max=len(first) - 1)
    start = (program - (ends - tiles)[sequence]) * block
    length_of = torch.where(there, lengths[sequence], 0)
    table = torch.stack([sequence, torch.where(there, start, 0), first[sequence], length_of], 1)
    return table.to(torch.int32), (len(program), heads, batch)


@register_flop_formula(torch.ops.tpformer.attention_forward, get_raw=True)
def _forward_flops(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Any, cu_seqlens: Tensor | None, *_: Any, **__: Any
) -> int:
    """As torch counts its own: every query sees every key of its sequence."""
    return sum(sdpa_flop_count(*shapes) for shapes in _shapes(q, k, v, cu_seqlens))


@register_flop_formula(torch.ops.tpformer.attention_backward, get_raw=True)
def _backward_flops(do: Tensor, dlse: Any, q: Tensor, k: Tensor, v: Tensor, *others: Any, **__: Any) -> int:
    cu_seqlens = others[3]
    return sum(sdpa_backward_flop_count(shapes[0], *shapes) for shapes in _shapes(q, k, v, cu_seqlens))


def _shapes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[tuple[Any, Any, Any]]:
    """Of each sequence, with as many KV heads as heads, which is what they are multiplied as."""
    b, heads, _, d = q.shape
    if cu_seqlens is None:
        return [(q.shape, (b, heads, k.shape[2], d), (b, heads, v.shape[2], d))]
    return [((1, heads, n, d),) * 3 for n in cu_seqlens.diff().tolist()]
