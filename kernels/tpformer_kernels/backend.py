"""Which implementation of an op runs: its Triton kernel or its reference in plain PyTorch."""

from typing import Literal

import torch
from torch import Tensor

from tpformer_kernels.jit import INTERPRETED, triton

Backend = Literal["auto", "triton", "torch"]
"""auto: Triton for fp32, bf16 and fp16 on CUDA, torch for everything else; matmul and attention choose more finely."""

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_backend(backend: str) -> None:
    """Raises ValueError for a name that is none."""
    if backend not in BACKENDS:
        raise ValueError(f"backend ({backend!r}) must be one of {', '.join(BACKENDS)}")


def use_triton(backend: Backend, x: Tensor) -> bool:
    """Whether the op's Triton kernel computes on x.

    Raises ValueError for an unknown name, and where "triton" is asked for and cannot run.
    """
    if backend == "auto":
        return x.is_cuda and triton is not None and x.dtype in DTYPES
    check_backend(backend)
    if backend == "torch":
        return False
    if triton is None:
        raise ValueError("backend 'triton' needs the package triton, which is not installed")
    if x.dtype not in DTYPES:
        raise ValueError(f"backend 'triton' computes fp32, bf16 and fp16, not {x.dtype}: use backend 'torch'")
    if not x.is_cuda and not INTERPRETED:
        raise ValueError(f"backend 'triton' needs a CUDA tensor, not {x.device.type} (or TRITON_INTERPRET=1 on a CPU)")
    return True
