"""What does not fit is refused by name and by value, by the kernels' path and the reference's alike."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tpformer_kernels as ops
from tests.kernels.support import DEVICE
from tpformer_kernels import backend as backends
from tpformer_kernels.cross_entropy import cross_entropy_gradient as gradient
from tpformer_kernels.cross_entropy import cross_entropy_statistics as statistics


def f(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def i(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=DEVICE)


def three(n: int) -> tuple[Tensor, Tensor, Tensor]:
    return f(n), f(n), f(n)


PLACE = (1, 2, 3)
ERRORS: dict[str, tuple[Callable[[Any], object], str]] = {
    "weight": (lambda b: ops.rms_norm(f(2, 6), f(5), 1e-5, backend=b), r"weight \(5,\) .* x \(2, 6\)"),
    "weight of no dims": (lambda b: ops.rms_norm(f(2, 6), f(), 1e-5, backend=b), r"weight \(\) .* x \(2, 6\)"),
    "x of no dims": (lambda b: ops.rms_norm(f(), f(1), 1e-5, backend=b), r"weight \(1,\) .* x \(\)"),
    "bias": (lambda b: ops.layer_norm(f(2, 6), f(6), f(1), 1e-5, backend=b), r"bias \(1,\) .* x \(2, 6\)"),
    "residual": (
        lambda b: ops.add_rms_norm(f(2, 6), f(1, 6), f(6), 1e-5, backend=b),
        r"residual \(1, 6\) .* x \(2, 6\)",
    ),
    "residual of layer norm": (
        lambda b: ops.add_layer_norm(f(2, 6), f(6), f(6), f(6), 1e-5, backend=b),
        r"residual \(6,\) .* x \(2, 6\)",
    ),
    "odd pairs": (lambda b: ops.gated_activation(f(2, 5), "silu", backend=b), r"gate_up \(2, 5\) must be even"),
    "no dims of pairs": (lambda b: ops.gated_activation(f(), "silu", backend=b), r"gate_up \(\) must be even"),
    "gate": (
        lambda b: ops.gated_activation(f(2, 6), "relu", backend=b),
        r"activation \('relu'\) .* silu, gelu, gelu_t",
    ),
    "gelu": (lambda b: ops.bias_gelu(f(2, 6), None, "silu", backend=b), r"activation \('silu'\) .* gelu, gelu_tanh"),
    "gelu's bias": (lambda b: ops.bias_gelu(f(2, 6), f(5), backend=b), r"bias \(5,\) .* x \(2, 6\)"),
    "dropout of 1": (lambda b: ops.dropout_add(f(1, 2, 6), None, 1.0, PLACE, backend=b), r"dropout \(1.0\)"),
    "dropout below 0": (lambda b: ops.dropout_add(f(1, 2, 6), None, -0.1, PLACE, backend=b), r"dropout \(-0.1\)"),
    "dropout of a matrix": (
        lambda b: ops.dropout_add(f(2, 6), None, 0.1, PLACE, backend=b),
        r"x \(2, 6\) must be \(b, s, d\), and residual None",
    ),
    "dropout's residual": (
        lambda b: ops.dropout_add(f(1, 2, 6), f(2, 6), 0.1, PLACE, backend=b),
        r"x \(1, 2, 6\) .* residual \(2, 6\)",
    ),
    "packed dims": (
        lambda b: ops.split_and_rotate(f(1, 2, 3, 8), f(2, 1, 4), f(2, 1, 4), backend=b),
        r"\(1, 2, 3, 8\)",
    ),
    "packed group": (
        lambda b: ops.split_and_rotate(f(1, 2, 3, 2, 8), f(2, 1, 4), f(2, 1, 4), backend=b),
        r"qkv \(1, 2, 3, 2, 8\) must be",
    ),
    "table": (
        lambda b: ops.split_and_rotate(f(1, 2, 3, 4, 8), f(3, 1, 4), f(3, 1, 4), backend=b),
        r"cos \(3, 1, 4\) and sin \(3, 1, 4\) .* \(1, 2, 3, 4, 8\)",
    ),
    "sin": (
        lambda b: ops.apply_rope(f(1, 2, 3, 8), f(1, 2, 3, 8), f(2, 1, 4), f(2, 1, 3), backend=b),
        r"sin \(2, 1, 3\)",
    ),
    "odd head": (
        lambda b: ops.apply_rope(f(1, 2, 3, 7), f(1, 2, 3, 7), f(2, 1, 3), f(2, 1, 3), backend=b),
        r"x .* \(1, 2, 3, 7\)",
    ),
    "k": (
        lambda b: ops.apply_rope(f(1, 2, 3, 8), f(2, 2, 3, 8), f(2, 1, 4), f(2, 1, 4), backend=b),
        r"q \(1, 2, 3, 8\) torch.float32 and k \(2, 2, 3, 8\)",
    ),
    "k's dtype": (
        lambda b: ops.apply_rope(f(1, 2, 3, 8), f(1, 2, 3, 8).half(), f(2, 1, 4), f(2, 1, 4), backend=b),
        r"float32 and k .* torch.float16 may differ in heads only",
    ),
    "q of three dims": (
        lambda b: ops.apply_rope(f(1, 2, 8), f(1, 2, 8), f(2, 1, 4), f(2, 1, 4), backend=b),
        r"\(1, 2, 8\)",
    ),
    "logits": (lambda b: statistics(f(2, 3, 6), i(2), 6, True, backend=b), r"logits \(2, 3, 6\) .* targets \(2,\)"),
    "targets": (lambda b: statistics(f(2, 6), i(3), 6, True, backend=b), r"logits \(2, 6\) .* targets \(3,\)"),
    "columns": (lambda b: statistics(f(2, 6), i(2), 7, True, backend=b), r"columns \(7\) must be in 0..6"),
    "negative columns": (lambda b: statistics(f(2, 6), i(2), -1, True, backend=b), r"columns \(-1\) must be in 0..6"),
    "targets of the gradient": (
        lambda b: gradient(f(2, 6), i(3), 6, f(2), three(2), backend=b),
        r"logits \(2, 6\) .* targets \(3,\)",
    ),
    "lse": (lambda b: gradient(f(2, 6), i(2), 6, f(1), three(2), backend=b), r"lse \(1,\)"),
    "weights": (lambda b: gradient(f(2, 6), i(2), 6, f(2), three(3), backend=b), r"\(3,\)"),
    "backend": (lambda b: ops.rms_norm(f(2, 6), f(6), 1e-5, backend="cuda"), r"backend \('cuda'\) .* auto, tr"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit(name: str, backend: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call(backend)


def test_dtypes_that_no_kernel_computes() -> None:
    with pytest.raises(ValueError, match=r"not torch.float64: use backend 'torch'"):
        ops.rms_norm(f(2, 6).double(), f(6).double(), 1e-5, backend="triton")
    assert ops.rms_norm(f(2, 6).double(), f(6).double(), 1e-5).dtype == torch.float64  # auto takes the reference


def test_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "INTERPRETED", False)
    x, weight = torch.randn(2, 6), torch.ones(6)
    with pytest.raises(ValueError, match=r"needs a CUDA tensor, not cpu"):
        ops.rms_norm(x, weight, 1e-5, backend="triton")
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5, backend="torch"))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "triton", None)
    with pytest.raises(ValueError, match=r"needs the package triton"):
        ops.rms_norm(f(2, 6), f(6), 1e-5, backend="triton")
    assert ops.rms_norm(f(2, 6), f(6), 1e-5).shape == (2, 6)
