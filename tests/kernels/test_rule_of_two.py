"""Our error is at most twice that of torch's own ops in the same dtype, and the same bits come out every time.

On a device in bf16 too, of many programs that run at once; under the interpreter of a few, one after the other.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tpformer_kernels as ops
from tests.kernels.cases import CASES, TRAINED
from tests.kernels.support import DEVICE, assert_as_good_as_torch, evaluate, exact

CUDA = DEVICE == "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if CUDA else (torch.float32, torch.float16)
SIZES = [(1, 1), (3, 15), (17, 1023), (5, 4097), (9000, 65), (67, 1025), (512, 4096)] if CUDA else [(1, 1), (6, 37)]
REPEATS, REPEATED = (50, (1031, 1025)) if CUDA else (2, (3, 37))

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", TRAINED)
def test_twice_torch_s_error(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    case = TRAINED[name]
    inputs = case.inputs(*size, dtype)
    ours = evaluate(lambda *x: case.ours(*x, backend="triton"), inputs, case.trained)
    theirs = evaluate(case.torchs, inputs, case.trained, ours.cotangents)
    expected = exact(case.torchs, inputs, case.trained, ours.cotangents)
    for kind in ("outputs", "gradients"):
        for triple in zip(*(getattr(x, kind) for x in (ours, theirs, expected)), strict=True):
            mine, torchs, right = triple
            assert_as_good_as_torch(mine, torchs, right, atol=1e-5)


def loss_of(stats: Tensor) -> tuple[Tensor, Tensor]:
    lse = stats[:, 0] + stats[:, 1].log()
    return lse, lse - stats[:, 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(67, 50257), (8, 128256), (512, 8193)] if CUDA else [(6, 137)], ids=str)
def test_twice_the_error_of_torch_s_cross_entropy(size: tuple[int, int], dtype: torch.dtype) -> None:
    rows, vocabulary = size
    logits = (3 * torch.randn(size, device=DEVICE)).to(dtype)
    targets, share = torch.randint(vocabulary, (rows,), device=DEVICE), torch.rand(rows, device=DEVICE)
    lse, loss = loss_of(ops.cross_entropy_statistics(logits, targets, vocabulary, False, backend="triton"))
    weights = (share, share, torch.zeros_like(share))
    gradient = ops.cross_entropy_gradient(logits, targets, vocabulary, lse, weights, backend="triton")
    results: list[tuple[Tensor, Tensor]] = []
    for wide in (torch.float32, torch.float64):
        x = logits.to(wide).requires_grad_()
        y = F.cross_entropy(x, targets, reduction="none")
        results.append((y.detach(), torch.autograd.grad(y, x, share.to(wide))[0]))
    (their_loss, their_gradient), (exact_loss, exact_gradient) = results
    assert_as_good_as_torch(loss, their_loss, exact_loss, atol=1e-5)
    assert_as_good_as_torch(gradient, their_gradient.to(dtype), exact_gradient, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_every_time(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    inputs = case.inputs(*REPEATED, dtype)
    first: Any = None
    for _ in range(REPEATS):
        cotangents = None if first is None else first.cotangents
        result = evaluate(lambda *x: case.ours(*x, backend="triton"), inputs, case.trained, cotangents)
        first = first or result
        for x, y in zip((*result.outputs, *result.gradients), (*first.outputs, *first.gradients), strict=True):
            assert torch.equal(x, y)
