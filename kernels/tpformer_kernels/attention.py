"""Attention (arXiv 1706.03762) without its matrix of scores, as FlashAttention (arXiv 2205.14135, 2307.08691) has it.

What a query sees is bounded by position (causal, window), by a mask of keys, and by where packed sequences end;
backward keeps q, k, v, the output and one number a query, and computes the scores again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpformer_kernels.apply import apply
from tpformer_kernels.attention_choice import attention_choice, sdpa
from tpformer_kernels.attention_ops import Settings, attention_backward, attention_forward
from tpformer_kernels.attention_reference import AttentionOptions, attention_reference, lse_reference
from tpformer_kernels.backend import Backend
from tpformer_kernels.dropout import drawn_at


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions = AttentionOptions(),
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
    explain: bool = False,
) -> Tensor:
    """softmax(scale · q kᵀ) v, (b, heads, sq, d); the strides of all are free. A query that sees no key gives zeros.

    q (b, heads, sq, d), k and v (b, kv_heads, sk, d), where heads are a multiple of kv_heads and not expanded.
    key_mask (b, sk): True for keys that may be seen. cu_seqlens (n + 1,), int32: where each of n packed sequences
    begins, and the last ends, from 0 to sq: b is 1, no sequence sees another, and positions count within one; for
    dropout, each is a sample of its own. Its numbers are not checked: they lie on the device.
    backend: "torch" is torch's own attention where it has the options, and else the definition in plain torch.
    explain prints which implementation runs, and why. Raises ValueError for what does not fit.
    """
    _check(q, k, v, key_mask, cu_seqlens)
    choice, why = attention_choice(q, k, options, key_mask=key_mask, cu_seqlens=cu_seqlens, backend=backend)
    if explain:
        print(f"attention: {choice}, {why}")
    if choice == "sdpa":
        return sdpa(q, k, v, options)
    if choice == "torch":
        return attention_reference(q, k, v, options, key_mask, cu_seqlens)
    return _in_triton(q, k, v, options, key_mask, cu_seqlens)[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions = AttentionOptions(),
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """attention, and the log of the sum of a query's exponentials, (b, heads, sq): -inf for one that sees no key.

    With them outputs over parts of the keys can be put together. Both have gradients. lse is fp32 (of fp64, fp64).
    """
    _check(q, k, v, key_mask, cu_seqlens)
    choice, _ = attention_choice(q, k, options, key_mask=key_mask, cu_seqlens=cu_seqlens, lse=True, backend=backend)
    if choice == "torch":
        lse = lse_reference(q, k, options, key_mask, cu_seqlens)
        return attention_reference(q, k, v, options, key_mask, cu_seqlens), lse
    return _in_triton(q, k, v, options, key_mask, cu_seqlens)


def explain_attention(
    q: Tensor,
    k: Tensor,
    options: AttentionOptions = AttentionOptions(),
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> str:
    """One line: which implementation `attention` takes for these, and why."""
    return "attention: {}, {}".format(
        *attention_choice(q, k, options, key_mask=key_mask, cu_seqlens=cu_seqlens, backend=backend)
    )


def _check(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Raises ValueError for shapes and dtypes that do not fit each other."""
    shapes = f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, v {tuple(v.shape)} {v.dtype}"
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes} must be (b, heads, sq, d) and twice (b, kv_heads, sk, d)")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: heads ({q.shape[1]}) must be a multiple of kv_heads ({k.shape[1]})")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{shapes} must have one dtype")
    if key_mask is not None and (key_mask.shape != (k.shape[0], k.shape[2]) or key_mask.dtype != torch.bool):
        raise ValueError(f"key_mask {tuple(key_mask.shape)} {key_mask.dtype} must be bool (b, sk), k {tuple(k.shape)}")
    if cu_seqlens is None:
        return
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} must be int32 (n + 1,), n above 0")
    if q.shape[0] != 1 or q.shape[2] != k.shape[2] or key_mask is not None:
        raise ValueError(f"{shapes}: with cu_seqlens b must be 1 and sq equal sk, and there is no key_mask")


def _in_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (seed, sample, drawn), head = drawn_at(*options.place[:2]), options.place[2]
    settings = Settings(
        options.causal,
        options.scale_for(q.shape[3]),
        options.window,
        options.softcap,
        options.dropout,
        seed,
        sample,
        head,
        drawn,
    )
    return apply(_Attention, q, k, v, key_mask, cu_seqlens, settings)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor]:
        o, lse = attention_forward(q, k, v, key_mask, cu_seqlens, *settings)
        ctx.settings = settings
        ctx.set_materialize_grads(False)  # lse has a gradient only where someone uses it
        ctx.save_for_backward(q, k, v, o, lse, key_mask, cu_seqlens)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, key_mask, cu_seqlens = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        with_q, with_kv = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        dq, dk, dv = attention_backward(do, dlse, q, k, v, o, lse, key_mask, cu_seqlens, *ctx.settings, with_q, with_kv)
        return dq if with_q else None, dk if with_kv else None, dv if with_kv else None, None, None, None
