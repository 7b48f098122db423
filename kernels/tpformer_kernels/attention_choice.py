"""Which implementation of attention runs: torch's own, ours in Triton, or the definition in plain torch."""

import json
import re
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tpformer_kernels.attention_reference import AttentionOptions, seen_keys
from tpformer_kernels.backend import Backend, use_triton
from tpformer_kernels.tables import architecture_of, constant_in_graph

Choice = Literal["sdpa", "triton", "torch"]
WIDEST = 256
"""The largest head_dim of our kernels."""


def attention_choice(
    q: Tensor,
    k: Tensor,
    options: AttentionOptions,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lse: bool = False,
    backend: Backend = "auto",
) -> tuple[Choice, str]:
    """What runs, and why in a few words. q (b, heads, sq, d), k (b, kv_heads, sk, d).

    auto: torch's own for what it can do, unless a measurement says otherwise; ours for the rest on CUDA, and on other
    devices the definition. Raises ValueError for an unknown backend, and where "triton" is asked for and cannot run.
    """
    if backend == "triton":
        use_triton(backend, q)
        check_width(q)
        return "triton", "asked for"
    ours = use_triton(backend, q) and q.shape[3] <= WIDEST
    obstacle = _obstacle(q, k, options, key_mask, cu_seqlens, lse)
    if obstacle is not None:
        return "triton" if ours else "torch", f"because torch's scaled_dot_product_attention has no {obstacle}"
    if ours and measured_faster(q, k):
        return "triton", "measured to be the faster one"
    return "sdpa", "torch's scaled_dot_product_attention, which has all that is asked for"


def _obstacle(
    q: Tensor,
    k: Tensor,
    options: AttentionOptions,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    lse: bool,
) -> str | None:
    """What torch's own attention cannot do, if anything."""
    obstacles = {
        "dropout by global position": options.dropout > 0,
        "softcap": options.softcap > 0,
        # its mask costs the kernels that CUDA has for the other cases, and as much memory as the scores
        "window": q.is_cuda and _windowed(q, k, options),
        "zeros for queries that key_mask leaves nothing": key_mask is not None,
        "packed sequences (cu_seqlens)": cu_seqlens is not None,
        "lse": lse,
        "causal mask for other numbers of keys than queries": options.causal and q.shape[2] != k.shape[2],
    }
    return next((name for name, there in obstacles.items() if there), None)


def _windowed(q: Tensor, k: Tensor, options: AttentionOptions) -> bool:
    """Whether the window leaves anything out."""
    return options.window is not None and options.window < max(q.shape[2], k.shape[2])


class Heads(NamedTuple):
    """A row of the table of measurements: a rank's heads, and the longest of the sequences it is for."""

    head_dim: int
    heads: int
    kv_heads: int
    up_to: int

    def __str__(self) -> str:
        return f"{self.head_dim} {self.heads}/{self.kv_heads} {self.up_to}"


def measured_faster(q: Tensor, k: Tensor) -> bool:
    """Whether ours was faster in a causal forward and backward of such heads, of the next power of two as length."""
    _, heads, queries, head_dim = q.shape
    for row in faster_rows(q.device):
        if (head_dim, heads, k.shape[1]) == row[:3] and row[3] // 2 < queries <= row[3]:
            return True
    return False


@constant_in_graph
def faster_rows(device: torch.device) -> tuple[tuple[int, ...], ...]:
    """The rows (see Heads) in which ours won; none as long as nothing is measured."""
    speedups = measurements(architecture_of(device))["speedups"]
    return tuple(tuple(map(int, re.findall(r"\d+", name))) for name, speedup in speedups.items() if (speedup or 0) > 1)


@cache
def measurements(architecture: int) -> dict[str, Any]:
    """The file of one architecture: how many times as fast as torch's ours is, by str(Heads); None: not measured."""
    name = f"tables/attention_sm_{architecture}.json"
    return json.loads(files("tpformer_kernels").joinpath(name).read_text(encoding="utf-8"))


def check_width(q: Tensor) -> None:
    """Raises ValueError for heads that are too wide for our kernels."""
    if not 0 < q.shape[3] <= WIDEST:
        raise ValueError(f"head_dim ({q.shape[3]}) must be 1 to {WIDEST} in Triton: use backend 'torch'")


def sdpa(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """torch's own attention: (b, heads, sq, d)."""
    mask = seen_keys(q.shape[2], k.shape[2], options, q.device) if _windowed(q, k, options) else None
    causal = options.causal and mask is None
    native = q.is_cuda  # measured: torch's CPU kernel is faster on expanded keys
    if not native and k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=options.scale, enable_gqa=native)
