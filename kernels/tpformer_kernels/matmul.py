"""Products of two matrices and what follows them; the layers' hot path.

No autograd: these are called in the forward and the backward of the layers' own functions. On CUDA auto takes the
kernel where the table says that it was measured faster (matmul_choice.py), on a CPU oneDNN where that is (onednn.py).
"""

import torch
from torch import Tensor

from tpformer_kernels.backend import Backend, use_triton
from tpformer_kernels.gated import GATES
from tpformer_kernels.gelu import GELUS
from tpformer_kernels.matmul_choice import faster, faster_by_kernel, rounded
from tpformer_kernels.matmul_ops import matmul_activated, matmul_forward
from tpformer_kernels.onednn import onednn_is_possible, onednn_matmul, prefers_onednn


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out: Tensor | None = None,
    tf32: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """a b + bias + residual, (m, k) times (k, n) plus (n) and (m, n) -> (m, n), summed in fp32; any strides.

    out: memory of none of the operands, which torch or oneDNN writes to whatever the backend, and which is returned.
    tf32: the kernel may round fp32 factors to it. Raises ValueError for shapes that do not fit.
    """
    _check_shapes(a, b, bias=bias, residual=residual, out=out)
    name = "residual" if residual is not None else "bias" if bias is not None else "plain"
    triton = use_triton(backend, a) and out is None
    if triton and (backend == "triton" or faster_by_kernel(a, b, name, tf32)):
        return matmul_forward(a, b, bias, residual, tf32)
    if backend != "torch" and prefers_onednn(a, b):
        y = onednn_matmul(a, b, bias)
        y = y if out is None else out.copy_(y)
    elif backend != "torch" and out is None and _turns(a, b):
        y = _turned(a, b)
        y = y if bias is None else y.add_(bias)
    elif bias is None:
        y = torch.mm(a, b, out=out)
    else:
        y = torch.addmm(bias, a, b, out=out)
    return y if residual is None else y.add_(residual)


def matmul_activation(
    a: Tensor, b: Tensor, bias: Tensor | None, activation: str, *, gated: bool = False
) -> tuple[Tensor, Tensor]:
    """a b + bias and the activation of that, both from one kernel: (m, k), (k, n), (n) -> (m, n), (m, n) or (m, n/2).

    activation: "gelu" or "gelu_tanh"; gated: one of GATES, of pairs of columns that lie side by side, (gate, up).
    Raises ValueError for another, for shapes that do not fit, and for pairs of an odd number of columns.
    """
    _check_shapes(a, b, bias=bias)
    names = GATES if gated else GELUS
    if activation not in names:
        raise ValueError(f"activation ({activation!r}) must be one of {', '.join(names)}")
    if gated and b.shape[1] % 2:
        raise ValueError(f"b {tuple(b.shape)} must have an even number of columns: a gate and an up each")
    number = GATES.index(activation) if gated else len(GATES) + GELUS.index(activation)
    y, pre = matmul_activated(a, b, bias, number, False)
    return pre, y


def fuses_activation(x: Tensor, rows: int, weight: Tensor, gated: bool, backend: Backend) -> bool:
    """Whether matmul_activation is the one to use for `rows` rows like those of x, times weightᵀ."""
    if not use_triton(backend, x):
        return False
    kind = "nt gated" if gated else "nt gelu"
    m, k = rounded(kind, rows, weight.shape[1])
    return backend == "triton" or faster(kind, m, len(weight), k, x.dtype, x.device)


def _turns(a: Tensor, b: Tensor) -> bool:
    """Whether to multiply as _turned does: few rows, of fp32, on a processor on which MKL is slow with them."""
    few = 1 <= len(a) <= (4 if b.shape[0] <= b.shape[1] else 2)
    if not few or a.device.type != "cpu" or not a.dtype == b.dtype == torch.float32:
        return False
    return b.numel() > 0 and b.t().is_contiguous() and not torch.compiler.is_compiling() and onednn_is_possible()


def _turned(a: Tensor, b: Tensor) -> Tensor:
    """a b as (bᵀ aᵀ)ᵀ, one row as two: reads a weight b once, and 1.1 to 3 times as fast as MKL's other kernels do."""
    several = a if len(a) > 1 else a.expand(2, -1).contiguous()
    return torch.mm(b.t(), several.t()).t()[: len(a)].contiguous()


def _check_shapes(a: Tensor, b: Tensor, **others: Tensor | None) -> None:
    """Broadcast by torch, or read beyond their end by oneDNN, wrong ones could pass."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a {tuple(a.shape)} must be (m, k) and b {tuple(b.shape)} (k, n)")
    for name, x in others.items():
        shape = (b.shape[1],) if name == "bias" else (a.shape[0], b.shape[1])
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} {tuple(x.shape)} must be {shape}")
