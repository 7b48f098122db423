"""Kernels as operators of torch, so that torch.compile sees one node with known outputs and never looks inside."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpformer_kernels.jit import INTERPRETED

Launcher = Callable[..., Any]

LIBRARY = torch.library.Library("tpformer", "DEF")  # what it defines lives as long as this name


def operator(signature: str, fake: Launcher) -> Callable[[Launcher], Launcher]:
    """Make a launcher the operator torch.ops.tpformer.<name>, for CUDA tensors and, interpreted, for CPU ones.

    signature: name and types in torch's schema language. fake: the same arguments -> empty outputs of the same
    shapes, strides and dtypes, which must not alias inputs.
    """

    def register(launcher: Launcher) -> Launcher:
        name = signature.split("(")[0]
        LIBRARY.define(signature)
        for device in ("CUDA", "CPU"):
            LIBRARY.impl(name, launcher, device)
        torch.library.register_fake(f"tpformer::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.tpformer, name)

    return register


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of its first argument, a tensor; an empty grid is nothing to do.

    Raises RuntimeError for tensors that are not on CUDA, unless Triton interprets.
    """
    if 0 in grid:
        return
    first: Tensor = arguments[0]
    options["enable_fp_fusion"] = True  # Triton's default is about to change
    if first.is_cuda:
        with torch.cuda.device(first.device):  # Triton launches on the current device, wherever the tensors are
            kernel[grid](*arguments, **options)
    elif INTERPRETED:
        kernel[grid](*arguments, **options)
    else:
        raise RuntimeError(f"a Triton kernel needs CUDA tensors, not {first.device.type}")


def rows_of(x: Tensor) -> Tensor:
    """x (..., d) as a matrix (n, d) whose rows are contiguous, wherever they lie; a copy only if there is none."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
