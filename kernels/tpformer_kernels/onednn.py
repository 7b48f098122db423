"""fp32 products on a CPU by oneDNN, where torch's own, which are MKL's, take a slower way.

On AMD processors MKL leaves the 512-bit registers alone; oneDNN, inside the same torch, uses them. bf16 products of
torch are oneDNN's already.
"""

from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import register_flop_formula

from tpformer_kernels.library import operator

SMALLEST = 2**27
"""FLOPs of a product; below, what it costs to ask oneDNN is not won back."""
COPY = 1.5
"""How many times as fast it must be where a matrix with gaps has to be copied first."""
PROBE = (512, 1024, 1024)
"""m, k and n of the products that are timed, once a process: 8 of each, some 10 ms long."""


@operator(
    "onednn_matmul(Tensor a, Tensor b, Tensor? bias=None) -> Tensor",
    lambda a, b, bias=None: a.new_empty(a.shape[0], b.shape[1]),
)
def onednn_matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (m, k) times b (k, n) plus bias (n), of fp32 on a CPU; contiguous."""
    if not a.shape[1]:  # oneDNN has no empty sum
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    bias = None if bias is None else bias.contiguous()  # it would be read as if it were
    # a weight with gaps would go through oneDNN's reference code, a thousand times slower
    return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b.t()), bias, "none", [], "")


@register_flop_formula(torch.ops.tpformer.onednn_matmul)
def _flops(a: tuple[int, int], b: tuple[int, int], *bias: Any, **options: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def prefers_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether a (m, k) times b (k, n) is to be oneDNN's: large, fp32, on a CPU on which that was seen to be faster."""
    if a.device.type != "cpu" or a.dtype != torch.float32 or b.dtype != torch.float32:
        return False
    if 2 * a.shape[0] * a.shape[1] * b.shape[1] < SMALLEST or torch.compiler.is_compiling():
        return False
    worth = 1.0 if is_dense(a) and is_dense(b) else COPY
    return bool(torch.backends.mkldnn.enabled) and onednn_speed(torch.get_num_threads()) > worth


@cache
def onednn_speed(threads: int) -> float:
    """How many times as fast as torch.mm it is, timed once a process; 0 where there is nothing to gain.

    Only on processors where MKL is known to be slow, by some 1.1 (Zen 4) or 2.2 (Zen 5): ranks and runs decide alike.
    Whoever needs every bit of a run again whatever else the machine does takes backend "torch".
    """
    if not onednn_is_possible():
        return 0.0
    m, k, n = PROBE
    with _disable_current_modes(), torch.no_grad():  # nobody who counts operations shall see these
        a, b = torch.ones(m, k), torch.ones(n, k).t()
        # in turn, and the fastest of each: what else the machine does can only slow one down
        times = [(_seconds(torch.mm, a, b), _seconds(onednn_matmul, a, b)) for _ in range(8)]
    return min(mkl for mkl, _ in times) / min(onednn for _, onednn in times)


@cache
def onednn_is_possible() -> bool:
    """Whether this torch has the operator and the MKL to replace, and the processor is AMD's with AVX-512."""
    built = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    operators = built and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return operators and torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() == "AuthenticAMD"


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _seconds(product: Any, a: Tensor, b: Tensor) -> float:
    start = perf_counter()
    product(a, b)
    return perf_counter() - start


def is_dense(x: Tensor) -> bool:
    """Whether x (m, n) or its transpose is contiguous."""
    return x.is_contiguous() or x.t().is_contiguous()


def _dense(x: Tensor) -> Tensor:
    return x if is_dense(x) else x.contiguous()
