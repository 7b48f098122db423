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
    """a b + bias + residual, (m, k) times (k, n) plus (n) and (m, n) -> (m, n), summed in fp32; any strides."""
    check_backend(backend)
    if backend != "torch" and prefers_onednn(a, b):
        y = onednn_matmul(a, b, bias)
        y = y if out is None else out.copy_(y)
    elif bias is None:
        y = torch.mm(a, b, out=out)
    else:
        y = torch.addmm(bias, a, b, out=out)
    return y if residual is None else y.add_(residual)
