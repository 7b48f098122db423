"""Attention of batch entries that differ in length, and of packed sequences: nothing else is seen, nothing is NaN."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.attention_cases import CAUSAL, EVERYTHING, PLAIN, Shape, prove
from tests.kernels.support import DEVICE, small_tables
from tpformer_kernels import AttentionOptions, attention, attention_with_lse

BACKENDS = ["triton", "torch"]
ENDS = [20, 20, 21, 38, 53]
"""Of five packed sequences: some longer than a block, one of a single token, one of none."""


def lengths_mask(*lengths: int, keys: int) -> Tensor:
    return torch.arange(keys, device=DEVICE) < torch.tensor(lengths, device=DEVICE).unsqueeze(1)


def packing(ends: list[int]) -> Tensor:
    return torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("options", [PLAIN, CAUSAL, EVERYTHING], ids=["plain", "causal", "everything"])
def test_a_mask_of_keys(options: AttentionOptions) -> None:
    """The second sequence is shorter, the third has holes, the fourth is empty."""
    mask = lengths_mask(35, 17, 35, 0, keys=35)
    mask[2, ::3] = False
    prove(Shape(4), options, key_mask=mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_sees_nothing_is_zero_and_gets_no_gradient(backend: Any) -> None:
    """An empty sequence; a first key that the first query needs; more queries than keys; whatever lse's gradient is."""
    shape = Shape(2, 2, 1, 24, 20)
    q, k, v = (x.requires_grad_() for x in shape.inputs())
    mask = lengths_mask(20, 0, keys=20)
    mask[0, 0] = False
    blind = torch.zeros(2, 24, dtype=torch.bool, device=DEVICE)
    blind[0, :5], blind[1] = True, True
    with small_tables():
        o, lse = attention_with_lse(q, k, v, CAUSAL, key_mask=mask, backend=backend)
        dlse = torch.randn_like(lse)
        if backend == "triton":  # as the derivative of a sum of exponentials may be; in plain torch, 0 · inf is NaN
            dlse = dlse.masked_fill(blind.unsqueeze(1), torch.inf)
        torch.autograd.backward((o, lse), (torch.randn_like(o), dlse))
    assert (lse == -torch.inf).equal(blind.unsqueeze(1).expand(2, 2, 24))
    nothing = blind.unsqueeze(1).expand(2, 2, 24)
    assert q.grad is not None and k.grad is not None and v.grad is not None
    assert (o[nothing] == 0).all() and (q.grad[nothing] == 0).all()
    for x in (o, q.grad, k.grad, v.grad):
        assert x.isfinite().all()
    for gradient in (k.grad, v.grad):
        assert (gradient[1] == 0).all() and (gradient[0, :, 0] == 0).all() and (gradient[0, :, 1:] != 0).all()


@pytest.mark.parametrize("name", ["plain", "causal", "everything", "everything, not causal"])
def test_packed_sequences(name: str) -> None:
    options = {"plain": PLAIN, "causal": CAUSAL, "everything": EVERYTHING}.get(name, replace(EVERYTHING, causal=False))
    prove(Shape(1, 2, 1, 53, 53), options, ends=ENDS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_torch_s_own_attention_of_each(backend: Any) -> None:
    q, k, v = Shape(1, 4, 2, 53, 53, 32).inputs()
    with small_tables():
        y = attention(q, k, v, CAUSAL, cu_seqlens=packing(ENDS), backend=backend)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    for start, end in zip([0, *ENDS], ENDS, strict=False):
        at = slice(start, end)
        own = F.scaled_dot_product_attention(q[:, :, at], k[:, :, at], v[:, :, at], is_causal=True)
        torch.testing.assert_close(y[:, :, at], own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_the_padded_batch(backend: Any) -> None:
    """With dropout too: sequence i draws what sample i of the batch draws."""
    ends, lengths = [20, 21, 38], [20, 1, 17]
    q, k, v = Shape(3, 2, 1, 20, 20).inputs()
    with small_tables():
        mask = lengths_mask(*lengths, keys=20)
        padded = attention(q, k, v, EVERYTHING, key_mask=mask, backend=backend)
        flat = [torch.cat([x[i, :, :n] for i, n in enumerate(lengths)], 1).unsqueeze(0) for x in (q, k, v)]
        packed = attention(flat[0], flat[1], flat[2], EVERYTHING, cu_seqlens=packing(ends), backend=backend)
    rows = torch.cat([padded[i, :, :n] for i, n in enumerate(lengths)], 1).unsqueeze(0)
    torch.testing.assert_close(packed, rows, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_neither_pads_nor_neighbours_are_looked_at() -> None:
    """NaN in other packed sequences changes nothing."""
    clean = Shape(1, 2, 1, 53, 53).inputs()
    found = []
    for poison in (0.0, torch.nan):
        q, k, v = (x.clone() for x in clean)
        for x in (q, k, v):
            x[:, :, :21], x[:, :, 38:] = poison, poison
            x.requires_grad_()
        with small_tables():
            y = attention(q, k, v, CAUSAL, cu_seqlens=packing(ENDS), backend="triton")
            gradients = torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
        found.append([x[:, :, 21:38] for x in (y, *gradients)])
    for clear, poisoned in zip(*found, strict=True):
        assert torch.equal(clear, poisoned)
