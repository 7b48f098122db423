"""Rotary position embedding of queries and keys in one launch, rotate-half form (arXiv 2104.09864).

Forward reads the packed projection where it lies; backward writes its gradient packed. Nothing is kept but the tables.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpformer_kernels.apply import apply
from tpformer_kernels.backend import Backend, use_triton
from tpformer_kernels.jit import jit, tl, triton
from tpformer_kernels.library import launch, operator
from tpformer_kernels.tables import options


def split_and_rotate(qkv: Tensor, cos: Tensor, sin: Tensor, *, backend: Backend = "auto") -> tuple[Tensor, ...]:
    """Take a packed projection apart and rotate its queries and keys by their positions' angles.

    qkv (b, s, kv_heads, group + 2, k): each KV head's queries, key, value; cos and sin (s, 1, k/2)
    -> q (b, s, kv_heads·group, k), k and v (b, s, kv_heads, k); v is a view of qkv.
    Raises ValueError for shapes that do not fit each other.
    """
    if qkv.dim() != 5 or qkv.shape[3] < 3:
        raise ValueError(f"qkv {tuple(qkv.shape)} must be (b, s, kv_heads, group + 2, head_dim)")
    _check_table(qkv, cos, sin)
    if use_triton(backend, qkv):
        return apply(_SplitAndRotate, qkv, cos, sin)
    q, k = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :]
    return apply(_Rotate, q, cos, sin), apply(_Rotate, k, cos, sin), qkv[..., -1, :]


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Rotate pairs (x[i], x[i + k/2]) of each head of q and k by their positions' angles.

    q (b, s, heads, k), k (b, s, kv_heads, k), cos and sin (s, 1, k/2) -> both contiguous.
    Raises ValueError for shapes that do not fit each other.
    """
    _check_table(q, cos, sin)
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.dtype != k.dtype:
        raise ValueError(f"q {tuple(q.shape)} {q.dtype} and k {tuple(k.shape)} {k.dtype} may differ in heads only")
    if use_triton(backend, q):
        return apply(_RotateTwo, q, k, cos, sin)
    return apply(_Rotate, q, cos, sin), apply(_Rotate, k, cos, sin)


class _Rotate(torch.autograd.Function):
    """The definition, in plain torch, of one tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y_first, y_second = y.chunk(2, dim=-1)
    if cos.dtype == x.dtype and not torch.compiler.is_compiling():  # which cannot follow an out= that is strided
        torch.mul(first, cos, out=y_first).addcmul_(second, sin, value=-sign)
        torch.mul(second, cos, out=y_second).addcmul_(first, sin, value=sign)
    else:  # in the tables' dtype, fp32
        y_first.copy_(first * cos - second * (sign * sin))
        y_second.copy_(second * cos + first * (sign * sin))
    return y


class _RotateTwo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return rope(q.unsqueeze(2), k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *rope(dq.unsqueeze(2), dk, *ctx.saved_tensors, True), None, None


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return *rope(qkv[..., :-2, :], qkv[..., -2, :], cos, sin, False), qkv[..., -1, :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None]:
        return rope_pack(dq, dk, dv, *ctx.saved_tensors), None, None


def _check_table(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = x.shape[-1] // 2
    if x.shape[-1] % 2 or tuple(cos.shape) != (x.shape[1], 1, half) or cos.shape != sin.shape:
        found = f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)}"
        raise ValueError(f"{found} must be (s, 1, head_dim/2) for x (b, s, ..., head_dim) {tuple(x.shape)}")


def _empty_like_heads(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    heads = q.shape[2] * q.shape[3]
    return q.new_empty(*q.shape[:2], heads, q.shape[4]), k.new_empty(k.shape)


@operator(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor q_out, Tensor k_out)", _empty_like_heads
)
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """q (b, s, n, group, k) -> (b, s, n·group, k), k (b, s, kv_heads, k) -> the same, rotated."""
    q_out, k_out = _empty_like_heads(q, k, cos, sin, inverse)
    _launch((q, k, None), (q_out.view(q.shape), k_out, None), cos, sin, inverse)
    return q_out, k_out


def _empty_pack(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, length, kv_heads, head_dim = dk.shape
    return dq.new_empty(batch, length, kv_heads, dq.shape[2] // kv_heads + 2, head_dim)


@operator("rope_pack(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor", _empty_pack)
def rope_pack(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of the packed projection: dq and dk rotated back, dv as it is."""
    out = _empty_pack(dq, dk, dv, cos, sin)
    ins = (dq.unflatten(2, (dk.shape[2], -1)), dk, dv)
    _launch(ins, (out[..., :-2, :], out[..., -2, :], out[..., -1, :]), cos, sin, True)
    return out


def _launch(
    ins: tuple[Tensor, Tensor, Tensor | None],
    outs: tuple[Tensor, Tensor, Tensor | None],
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
) -> None:
    """Queries (b, s, n, group, k), keys and maybe values (b, s, kv_heads, k), read and written by strides."""
    q, k, v = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in ins)
    assert q is not None and k is not None
    if q.numel() == 0:
        return
    batch, length, _, group, head_dim = q.shape
    heads, kv_heads = q.shape[2] * group, k.shape[2]
    meta = options("rope", head_dim, q.device)
    q_block, k_block = (min(meta["BLOCK_HEADS"], triton.next_power_of_2(n)) for n in (heads, kv_heads))
    q_blocks, k_blocks = triton.cdiv(heads, q_block), triton.cdiv(kv_heads, k_block)
    grid = (batch * length, q_blocks + k_blocks * (1 if v is None else 2))
    every = (q, k, k if v is None else v, outs[0], outs[1], outs[1] if outs[2] is None else outs[2])
    strides = [n for x in every for n in x.stride()[:-1]]
    launch(
        _rope_kernel,
        grid,
        *(q, k, v, *outs, cos.contiguous(), sin.contiguous(), *strides),
        *(length, heads, kv_heads, group, head_dim // 2, q_blocks, k_blocks),
        SIGN=-1 if inverse else 1,
        Q_BLOCK=q_block,
        K_BLOCK=k_block,
        HALF=triton.next_power_of_2(head_dim // 2),
        num_warps=meta["num_warps"],
    )


@jit(do_not_specialize=["length"])
def _rope_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    cos_ptr,
    sin_ptr,
    q_stride_b,
    q_stride_s,
    q_stride_kv,
    q_stride_g,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    q_out_stride_b,
    q_out_stride_s,
    q_out_stride_kv,
    q_out_stride_g,
    k_out_stride_b,
    k_out_stride_s,
    k_out_stride_h,
    v_out_stride_b,
    v_out_stride_s,
    v_out_stride_h,
    length,
    heads,
    kv_heads,
    group,
    half,
    q_blocks,
    k_blocks,
    SIGN: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
):
    """One program: one token's block of query heads, or of key heads, or (backward) of value heads, to be copied."""
    token = tl.program_id(0)
    b, s = (token // length).to(tl.int64), (token % length).to(tl.int64)
    part = tl.program_id(1)
    i = tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_ptr + s * half + i, i < half, 0.0).to(tl.float32)
    sin = SIGN * tl.load(sin_ptr + s * half + i, i < half, 0.0).to(tl.float32)
    if part < q_blocks:
        head = part * Q_BLOCK + tl.arange(0, Q_BLOCK)[:, None]
        kv, g = (head // group).to(tl.int64), (head % group).to(tl.int64)
        source = q_ptr + b * q_stride_b + s * q_stride_s + kv * q_stride_kv + g * q_stride_g
        target = q_out_ptr + b * q_out_stride_b + s * q_out_stride_s + kv * q_out_stride_kv + g * q_out_stride_g
        _rotate_heads(source, target, cos, sin, i, half, head < heads)
    else:  # other names: their shapes are others, and Triton joins what two branches call the same
        kv_head = (part - q_blocks) * K_BLOCK + tl.arange(0, K_BLOCK)[:, None]
        if part < q_blocks + k_blocks:
            k_source = k_ptr + b * k_stride_b + s * k_stride_s + kv_head.to(tl.int64) * k_stride_h
            k_target = k_out_ptr + b * k_out_stride_b + s * k_out_stride_s + kv_head.to(tl.int64) * k_out_stride_h
            _rotate_heads(k_source, k_target, cos, sin, i, half, kv_head < kv_heads)
        elif v_ptr is not None:
            v_head = (kv_head - k_blocks * K_BLOCK).to(tl.int64)
            v_source = v_ptr + b * v_stride_b + s * v_stride_s + v_head * v_stride_h
            v_target = v_out_ptr + b * v_out_stride_b + s * v_out_stride_s + v_head * v_out_stride_h
            # no rotation is one by the angle 0
            _rotate_heads(v_source, v_target, tl.full((1, HALF), 1.0, tl.float32), 0.0, i, half, v_head < kv_heads)


@jit
def _rotate_heads(source, target, cos, sin, i, half, rows):
    """A tile of heads (Q_BLOCK or K_BLOCK, HALF) of each half."""
    mask = rows & (i < half)
    first = tl.load(source + i, mask, 0.0).to(tl.float32)
    second = tl.load(source + half + i, mask, 0.0).to(tl.float32)
    tl.store(target + i, (first * cos - second * sin).to(target.dtype.element_ty), mask)
    tl.store(target + half + i, (second * cos + first * sin).to(target.dtype.element_ty), mask)
