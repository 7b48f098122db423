"""How the attention kernels are compiled for every row of every table; see compile_only."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

OPS: Any = torch.ops.tpformer
BF16, FP32 = (torch.bfloat16,), (torch.float32,)
WIDEST = 256
WIDEST_FP32 = 128
"""Of fp32 heads beyond, a few registers spill; they are compiled, but not complained about."""
PACKED, PLAIN, MASKED = "window, packed", "causal", "not causal, masked"
HEAVY, CAPPED, FULL = "window, packed, capped, dropout", "causal, capped", "not causal, masked, dropout"


def attention(rows: int, size: int, dtype: torch.dtype, options: str, kernel: str) -> None:
    """One of forward, dkdv and dq, with four query heads to a KV head."""
    q, k = torch.empty(1, 8, rows, size, dtype=dtype), torch.empty(1, 2, rows, size, dtype=dtype)
    key_mask = torch.ones(1, rows, dtype=torch.bool) if "masked" in options else None
    cu_seqlens = torch.tensor([0, rows // 2, rows], dtype=torch.int32) if "packed" in options else None
    window, softcap = rows // 4 if "window" in options else None, 30.0 if "capped" in options else 0.0
    how = ("not causal" not in options, 0.5, window, softcap, 0.1 if "dropout" in options else 0.0, 1, 2, 3, None)
    if kernel == "forward":
        OPS.attention_forward(q, k, k, key_mask, cu_seqlens, *how)
        return
    lse = torch.empty(1, 8, rows)
    which = kernel in ("dq", "delta"), kernel == "dkdv"
    OPS.attention_backward(q, lse, q, k, k, q, lse, key_mask, cu_seqlens, *how, *which)


Fields = tuple[Callable[..., None], dict[str, tuple[str, ...]], int, tuple[torch.dtype, ...]]


def variants(kernel: str) -> dict[str, Fields]:
    """The keys of one kernel: with neither dropout nor a soft cap, with them, and in fp32."""
    call = partial(attention, kernel=kernel)
    return {
        f"attention_{kernel}": (call, {"options": (PACKED, PLAIN, MASKED)}, WIDEST, BF16),
        f"attention_{kernel}_small": (call, {"options": (HEAVY, CAPPED, FULL)}, WIDEST, BF16),
        f"attention_{kernel}_fp32": (call, {"options": (HEAVY,)}, WIDEST_FP32, FP32),
    }


ATTENTION: dict[str, Fields] = {
    **variants("forward"),
    **variants("dkdv"),
    **variants("dq"),
    "attention_delta": (partial(attention, kernel="delta"), {"options": (PLAIN,)}, WIDEST, BF16),
}
