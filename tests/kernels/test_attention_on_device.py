"""What only a GPU can show of attention: the same bits every time, twice torch's error at most, memory, graphs.

Products whose left factor lies in registers are where an assembler has been wrong before, and then not every time.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.attention_cases import CAUSAL, EVERYTHING, PLAIN, Shape, ours
from tests.kernels.support import Result, assert_as_good_as_torch, evaluate
from tpformer_kernels import AttentionOptions, attention, attention_with_lse, explain_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

REPEATS = 50
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OPTIONS = {
    "plain": PLAIN,
    "causal": CAUSAL,
    "window": AttentionOptions(causal=True, window=300),
    "everything": replace(EVERYTHING, window=300),
}
ENDS = [700, 701, 1000, 1031]


def everything(result: Result) -> tuple[Tensor, ...]:
    return (*result.outputs, *result.gradients)


# each costs minutes of compilation if all are combined
CONFIGURATIONS = [(name, d, torch.bfloat16) for name in (*OPTIONS, "packed", "masked") for d in (64, 128, 256)]
CONFIGURATIONS += [("causal", 80, torch.bfloat16)]
CONFIGURATIONS += [("everything", d, dtype) for d in (64, 128) for dtype in (torch.float16, torch.float32)]


@pytest.mark.parametrize(("name", "d", "dtype"), CONFIGURATIONS, ids=str)
def test_the_same_bits_every_time(name: str, d: int, dtype: torch.dtype) -> None:
    shape, options = Shape(1, 8, 2, 1031, 1031, d), OPTIONS.get(name, CAUSAL)
    masks: dict[str, Any] = {}
    if name == "packed":
        masks["cu_seqlens"] = torch.tensor([0, *ENDS], dtype=torch.int32, device="cuda")
    if name == "masked":
        masks["key_mask"] = torch.rand(1, 1031, device="cuda") < 0.9
    inputs = shape.inputs(dtype)
    first = evaluate(ours(options, **masks), inputs, 3)
    for _ in range(REPEATS - 1):
        again = evaluate(ours(options, **masks), inputs, 3, first.cotangents)
        assert all(torch.equal(x, y) for x, y in zip(everything(again), everything(first), strict=True))
    wide = [x.double() for x in inputs]
    right = evaluate(ours(options, "torch", **masks), wide, 3, [x.double() for x in first.cotangents])
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    for x, y in zip(everything(first), everything(right), strict=True):
        assert (x.double() - y).norm() <= tolerance * y.norm()


@pytest.mark.parametrize(("d", "dtype"), [(48, torch.bfloat16), (128, torch.bfloat16), (128, torch.float32)], ids=str)
@pytest.mark.parametrize("size", [1, 127, 1024, 2050])
@pytest.mark.parametrize("causal", [True, False])
def test_twice_the_error_of_torch_s_own(causal: bool, size: int, d: int, dtype: torch.dtype) -> None:
    """Of its definition by products and softmax, in the same dtype, forward and backward."""
    inputs = Shape(1, 4, 2, size, size, d).inputs(dtype)

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    options = AttentionOptions(causal=causal)
    mine = evaluate(lambda q, k, v: attention(q, k, v, options, backend="triton"), inputs, 3)
    theirs = evaluate(torchs, inputs, 3, mine.cotangents)
    right = evaluate(torchs, [x.double() for x in inputs], 3, [x.double() for x in mine.cotangents])
    for triple in zip(everything(mine), everything(theirs), everything(right), strict=True):
        assert_as_good_as_torch(*triple, atol=1e-4 if dtype == torch.float32 else 1e-3)


def test_dropout_is_the_reference_s() -> None:
    """Bit by bit: which probabilities are dropped, beyond one tile."""
    q, k = torch.zeros(2, 3, 300, 128, device="cuda"), torch.zeros(2, 1, 128, 128, device="cuda")
    v = torch.eye(128, device="cuda").expand_as(k)
    options = AttentionOptions(dropout=0.3, place=((1 << 63) + 5, 7, 3))
    for dtype in DTYPES:
        mine, theirs = (
            attention(q.to(dtype), k.to(dtype), v.to(dtype), options, backend=b) for b in ("triton", "torch")
        )
        assert torch.equal(mine == 0, theirs == 0)


def test_no_matrix_of_scores_is_kept() -> None:
    q, k, v = (x.requires_grad_() for x in Shape(1, 8, 8, 16384, 16384, 64).inputs(torch.bfloat16))
    y, lse = attention_with_lse(q, k, v, CAUSAL)
    dy, dlse = torch.randn_like(y), torch.randn_like(lse)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.backward((y, lse), (dy, dlse))
    assert torch.cuda.max_memory_allocated() - before < 4 * 2 * q.numel() + (16 << 20)  # the scores take 4 GB


@pytest.mark.parametrize("packed", [True, False])
def test_in_a_graph_and_without_waiting(packed: bool) -> None:
    inputs = Shape(1, 4, 2, 1031, 1031, 64).inputs(torch.bfloat16)
    cu = torch.tensor([0, *ENDS], dtype=torch.int32, device="cuda") if packed else None
    run = ours(CAUSAL, cu_seqlens=cu)

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention_with_lse(q, k, v, CAUSAL, cu_seqlens=cu, backend="triton")

    expected = evaluate(run, inputs, 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(both, inputs, 3, expected.cotangents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(run, inputs, 3, expected.cotangents)
    graph.replay()
    for x, y in zip(everything(captured), everything(expected), strict=True):
        assert torch.equal(x, y)


def test_auto_takes_torch_s_own_where_it_can_and_ours_elsewhere() -> None:
    q, k, _ = Shape(1, 4, 2, 64, 64, 64).inputs(torch.bfloat16)
    assert explain_attention(q, k, EVERYTHING).startswith("attention: triton")
    assert explain_attention(q, k, replace(CAUSAL, window=8)).startswith("attention: triton")
    assert explain_attention(q, k, CAUSAL) != explain_attention(q, k, CAUSAL, backend="triton")
