"""A weight's gradient, summed in place over many parts, in a wider dtype than that of the products' factors."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tpformer_kernels.backend import Backend, use_triton
from tpformer_kernels.library import operator
from tpformer_kernels.matmul_choice import faster_by_kernel
from tpformer_kernels.matmul_ops import matmul_accumulate_
from tpformer_kernels.onednn import onednn_matmul, prefers_onednn


def accumulate_(total: Tensor, a: Tensor, b: Tensor, first: bool, *, backend: Backend = "auto") -> None:
    """total (m, n) += aᵀ b, or = if it is the first part; a (k, m), b (k, n) in total's dtype or a narrower one.

    Raises ValueError for shapes that do not fit: torch would resize total.
    """
    if a.dim() != 2 or b.dim() != 2 or len(a) != len(b) or total.shape != (a.shape[1], b.shape[1]):
        shapes = tuple(total.shape), tuple(a.shape), tuple(b.shape)
        raise ValueError("total {} must be (m, n), a {} (k, m) and b {} (k, n)".format(*shapes))
    triton = use_triton(backend, a) and total.dtype == torch.float32
    if triton and (backend == "triton" or faster_by_kernel(a.t(), b, "accumulate", False)):
        matmul_accumulate_(total, a, b, first)
    elif backend != "torch" and prefers_onednn(a.t(), b) and total.dtype == a.dtype:
        product = onednn_matmul(a.t(), b)
        if first:
            total.copy_(product)
        else:
            total.add_(product)
    else:
        accumulate_by_torch_(total, a, b, first)


@operator("accumulate_(Tensor(a!) total, Tensor a, Tensor b, bool first) -> ()", lambda *arguments: None)
def accumulate_by_torch_(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """An operator, because torch.compile cannot yet take a matmul of torch with a wider output."""
    if a.dtype != total.dtype and a.is_cuda:  # the tensor cores' fp32 sums, added in fp32
        if first:
            torch.mm(a.t(), b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a.t(), b, out_dtype=total.dtype, out=total)
        return
    a, b = a.to(total.dtype), b.to(total.dtype)
    if first:
        torch.mm(a.t(), b, out=total)
    else:
        total.addmm_(a.t(), b)


@register_flop_formula(torch.ops.tpformer.accumulate_)
def _flops(total: Any, a: tuple[int, int], b: tuple[int, int], first: bool, **options: Any) -> int:
    """For torch's counter, which sees shapes and no matmul inside an operator."""
    return 2 * a[0] * a[1] * b[1]
