"""Products of two matrices and what follows them; the layers' hot path.

No autograd: these are called in the forward and the backward of the layers' own functions.
"""

import torch
from torch import Tensor

from tpformer_kernels.backend import Backend, check_backend
from tpformer_kernels.onednn import onednn_matmul, prefers_onednn


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """a b + bias + residual, (m, k) times (k, n) plus (n) and (m, n) -> (m, n), summed in fp32; any strides.

    out: memory of none of the operands, which is written to and returned. Raises ValueError for shapes that do not fit.
    """
    check_backend(backend)
    _check_shapes(a, b, bias=bias, residual=residual, out=out)
    if backend != "torch" and prefers_onednn(a, b):
        y = onednn_matmul(a, b, bias)
        y = y if out is None else out.copy_(y)
    elif bias is None:
        y = torch.mm(a, b, out=out)
    else:
        y = torch.addmm(bias, a, b, out=out)
    return y if residual is None else y.add_(residual)


def _check_shapes(a: Tensor, b: Tensor, **others: Tensor | None) -> None:
    """Broadcast by torch, or read beyond their end by oneDNN, wrong ones could pass."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a {tuple(a.shape)} must be (m, k) and b {tuple(b.shape)} (k, n)")
    for name, x in others.items():
        shape = (b.shape[1],) if name == "bias" else (a.shape[0], b.shape[1])
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} {tuple(x.shape)} must be {shape}")
