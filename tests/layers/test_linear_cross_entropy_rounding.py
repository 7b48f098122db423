"""How linear and cross entropy in chunks round: gradients of many chunks in fp32, and unscaled until backward."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.layers.losses import many_tokens
from tests.layers.prove import gradient, noise
from tpformer import vocab_parallel_cross_entropy
from tpformer.layers import linear_cross_entropy
from tpformer.layers.linear_cross_entropy import vocab_parallel_linear_cross_entropy

Tensors = tuple[Tensor, Tensor, Tensor]


def exact(tensors: Tensors, upstream: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of x and weight of the same numbers in fp64."""
    x, weight = (t.detach().double().requires_grad_() for t in tensors[:2])
    loss = F.cross_entropy(F.linear(x, weight)[0], tensors[2][0])
    loss.backward(torch.tensor(upstream, dtype=torch.float64))
    return loss.detach(), gradient(x), gradient(weight)


def error(found: Tensor, expected: Tensor) -> float:
    """The length of the difference, relative to that of what is expected."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def train(tensors: Tensors, chunk_tokens: int, upstream: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Our loss and gradients, in chunks of so many tokens."""
    x, weight, targets = tensors
    x.grad = weight.grad = None
    bytes_ = chunk_tokens * len(weight) * weight.element_size()
    loss = vocab_parallel_linear_cross_entropy(x, weight, targets, chunk_bytes=bytes_)
    loss.backward(torch.tensor(upstream, dtype=loss.dtype))
    return loss.detach(), gradient(x), gradient(weight)


LOW = {torch.bfloat16: 2**-9, torch.float16: 2**-12}  # half a step between two numbers: what rounding once costs


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_many_chunks_lose_no_more_than_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: 512 sums in the weight's own dtype miss the bound that one chunk and 512 in fp32 keep."""
    tensors = many_tokens(512, 16, 64, dtype)
    tensors[0].data += 1.0  # features of one sign, so that the sum grows beyond what is added to it
    expected = exact(tensors)
    bound = 4 * LOW[dtype]  # the logits, their gradient and the result are rounded to dtype
    for chunk_tokens in (512, 1):
        loss, dx, dweight = train(tensors, chunk_tokens)
        assert loss.dtype == torch.float32
        assert dx.dtype == dweight.dtype == dtype
        assert error(loss, expected[0]) <= bound
        assert error(dx, expected[1]) <= bound
        assert error(dweight, expected[2]) <= bound

    class InOwnDtype(linear_cross_entropy._Gradients):
        def __init__(self, flat: Tensor, weight: Tensor, *others: Any):
            super().__init__(flat, weight, *others)
            self.dweight = torch.empty_like(weight)

    monkeypatch.setattr(linear_cross_entropy, "_Gradients", InOwnDtype)
    assert error(train(tensors, 512)[2], expected[2]) <= bound  # one sum is no matter
    assert error(train(tensors, 1)[2], expected[2]) > 4 * bound


def large_mean() -> Tensors:
    """Many tokens in fp16, whose probabilities are below 2^-9: over n, and over 32 micro-batches, nothing is left."""
    x, weight, targets = many_tokens(4096, 8, 1024, torch.float16)
    with torch.no_grad():
        x += 1.0
        weight += (0.5 * noise("mean", 8)).half()
    return x, weight, targets


MICRO_BATCHES = 1 / 32


def test_fp16_gradients_of_a_mean_over_many_tokens_do_not_underflow() -> None:
    tensors = large_mean()
    expected = exact(tensors, MICRO_BATCHES)
    for chunk_tokens in (4096, 1024):
        loss, dx, dweight = train(tensors, chunk_tokens, MICRO_BATCHES)
        assert error(loss, expected[0]) <= 2**-10
        # fp16's smallest step is what is left of their precision
        assert (dx.double() - expected[1]).abs().max() <= 2**-10 * expected[1].abs().max() + 2**-25
        assert (dweight.double() - expected[2]).abs().max() <= 2**-10 * expected[2].abs().max() + 2**-25


def test_scaling_the_gradient_of_the_logits_first_loses_it() -> None:
    """Negative control: in fp16 the logits' own gradient, times 1/n, is 0 but at the target."""
    x, weight, targets = large_mean()
    expected = exact((x, weight, targets), MICRO_BATCHES)
    x.grad = weight.grad = None
    vocab_parallel_cross_entropy(F.linear(x, weight), targets).backward(torch.tensor(MICRO_BATCHES))
    assert error(gradient(weight), expected[2]) > 0.1
    assert error(gradient(x), expected[1]) > 0.1


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_of_low_precision_is_fp32(reduction: Any) -> None:
    x, weight, targets = many_tokens(7, 4, 10, torch.bfloat16)
    loss = vocab_parallel_linear_cross_entropy(x, weight, targets, reduction=reduction, label_smoothing=0.1)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(F.linear(x, weight)[0].double(), targets[0], label_smoothing=0.1, reduction=reduction)
    torch.testing.assert_close(loss.double().flatten(), expected.flatten(), rtol=1e-6, atol=1e-6)
