"""The contenders for attention: ours, and torch's own as it chooses, and by each of its kernels for CUDA."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tpformer_kernels as ours
from benchmarks.kernel_providers import CUDNN, EAGER, EFFICIENT, FLASH, OURS, PLACE, Leaves, Provider

CAUSAL = ours.AttentionOptions(causal=True)


def attention(dropout: float = 0.0) -> tuple[Provider, ...]:
    """Causal attention of (q, k, v), in the memory layout that the projections give; with dropout, ours alone."""
    options = ours.AttentionOptions(causal=True, dropout=dropout, place=PLACE)

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ours.attention(q, k, v, options, backend="triton" if q.is_cuda else "torch")

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ours.attention(q, k, v, options, backend="torch")

    if dropout:
        return (Provider(OURS, fused, definition, 3),)
    mine, torchs = Provider(OURS, fused, plain, 3), Provider(EAGER, grouped, plain, 3)
    if not torch.cuda.is_available():
        return mine, torchs
    by_flash, by_cudnn = (partial(grouped, kernel=k) for k in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION))
    others = (
        Provider(FLASH, by_flash, plain, 3),
        Provider(CUDNN, by_cudnn, plain, 3),
        # has no groups: its keys and values are expanded beforehand
        Provider(EFFICIENT, partial(grouped, kernel=SDPBackend.EFFICIENT_ATTENTION), plain, 3, expanded),
    )
    return mine, torchs, *others


def grouped(q: Tensor, k: Tensor, v: Tensor, kernel: SDPBackend | None = None) -> Tensor:
    """torch's own, with the kernel of its choice or a certain one."""
    groups = q.shape[1] != k.shape[1]
    if kernel is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups)
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own on expanded keys and values, which has kernels for fp32 that keep no scores."""
    q, k, v = expanded(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def expanded(q: Tensor, k: Tensor, v: Tensor) -> Leaves:
    """Each KV head repeated for the query heads of its group."""
    return q, *(x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
