"""The launches of matmul's kernels, as operators: y = a b (+ bias + residual), activated, or added in place."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tpformer_kernels import matmul_kernels as kernels
from tpformer_kernels.gated import GATES
from tpformer_kernels.library import launch, operator
from tpformer_kernels.matmul_choice import ALIGNMENT, choose, descriptors_fit, kind_of, programs


class Epilogue(NamedTuple):
    """What happens to a tile of sums before it is written."""

    name: str
    bias: Tensor | None = None
    residual: Tensor | None = None
    activation: int = -1
    """Of the rounded sums, by number; -1 is none."""
    pre: Tensor | None = None
    """Where they are kept."""


def _empty(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@operator(
    "matmul_forward(Tensor a, Tensor b, Tensor? bias, Tensor? residual, bool tf32) -> Tensor",
    lambda a, b, bias, residual, tf32: _empty(a, b),
)
def matmul_forward(a: Tensor, b: Tensor, bias: Tensor | None, residual: Tensor | None, tf32: bool) -> Tensor:
    """a (m, k) b (k, n) + bias (n) + residual (m, n), of any strides: added in fp32, rounded once."""
    y = _empty(a, b)
    name = "residual" if residual is not None else "bias" if bias is not None else "plain"
    _run(y, a, b, Epilogue(name, bias, residual), tf32)
    return y


def _empty_activated(a: Tensor, b: Tensor, bias: Tensor | None, activation: int, tf32: bool) -> tuple[Tensor, Tensor]:
    n = b.shape[1]
    return a.new_empty(a.shape[0], n // 2 if activation < len(GATES) else n), _empty(a, b)


@operator(
    "matmul_activated(Tensor a, Tensor b, Tensor? bias, int activation, bool tf32) -> (Tensor y, Tensor pre)",
    _empty_activated,
)
def matmul_activated(a: Tensor, b: Tensor, bias: Tensor | None, activation: int, tf32: bool) -> tuple[Tensor, Tensor]:
    """pre = a b + bias (m, n), and y = act(pre): by number the GATES of pairs of columns, (m, n/2), then the GELUS."""
    y, pre = _empty_activated(a, b, bias, activation, tf32)
    name = "gated" if activation < len(GATES) else "gelu"
    _run(y, a, b, Epilogue(name, bias, None, activation, pre), tf32)
    return y, pre


@operator("matmul_accumulate_(Tensor(a!) total, Tensor a, Tensor b, bool first) -> ()", lambda *arguments: None)
def matmul_accumulate_(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (m, n), fp32, += aᵀ b, or = if it is the first part; a (k, m), b (k, n)."""
    # each tile of total is read by the program that writes it, before it does
    _run(total, a.t(), b, Epilogue("accumulate", residual=None if first else total), False)


def _run(y: Tensor, a: Tensor, b: Tensor, epilogue: Epilogue, tf32: bool) -> None:
    """Launch one of the two kernels, with the options for the shape."""
    (m, k), n = a.shape, b.shape[1]
    if m == 0 or n == 0:
        return
    fit = descriptors_fit(a, b) and a.data_ptr() % ALIGNMENT == 0 and b.data_ptr() % ALIGNMENT == 0
    kind = kind_of(a, b, epilogue.name)
    choice = choose(kind, m, n, k, a.dtype, a.device, fit=fit, tf32=tf32)
    options = choice.options
    blocks = options["BLOCK_M"], options["BLOCK_N"], options["BLOCK_K"]
    flags = {
        "ACTIVATION": epilogue.activation,
        "PRECISION": "tf32" if tf32 and a.dtype == torch.float32 else "ieee",
        **options,
    }
    grid = (min(programs(a.device), -(-m // blocks[0]) * -(-n // blocks[1])),)
    bias, residual = epilogue.bias, epilogue.residual
    behind = (None if bias is None else bias.contiguous(), residual, m, n, k, *y.stride())
    behind += residual.stride() if residual is not None else (0, 0)
    if choice.loads == "descriptors":
        left, left_turned = _descriptor(a, (blocks[0], blocks[2]))
        right, right_turned = _descriptor(b, (blocks[2], blocks[1]))
        flags |= {"A_TRANSPOSED": left_turned, "B_TRANSPOSED": right_turned}
        launch(kernels.matmul_descriptor_kernel, grid, y, epilogue.pre, left, right, *behind, **flags)
    else:
        launch(kernels.matmul_kernel, grid, y, epilogue.pre, a, b, *behind, *a.stride(), *b.stride(), **flags)


def _descriptor(x: Tensor, block: tuple[int, int]) -> tuple[Any, bool]:
    """What the copy engine needs to know of a matrix as it lies in memory, and whether that is its transpose."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    turned = x.stride(1) != 1
    x, block = (x.t(), block[::-1]) if turned else (x, block)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block)), turned


@register_flop_formula([torch.ops.tpformer.matmul_forward, torch.ops.tpformer.matmul_activated])
def _flops(a: tuple[int, int], b: tuple[int, int], *others: Any, **options: Any) -> int:
    """For torch's counter, which sees shapes and no matmul inside an operator."""
    return 2 * a[0] * a[1] * b[1]


@register_flop_formula(torch.ops.tpformer.matmul_accumulate_)
def _flops_accumulated(total: Any, a: tuple[int, int], b: tuple[int, int], first: bool, **options: Any) -> int:
    return 2 * a[0] * a[1] * b[1]
