"""Attention against torch's own ops in fp64: outputs, lse and all gradients, in memory that is NaN between canaries."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.attention_cases import CAUSAL, EVERYTHING, OPTIONS, SHAPES, Shape, exact, expected, ours, prove
from tests.kernels.support import (
    DEVICE,
    TOLERANCE,
    assert_as_good_as_torch,
    assert_near,
    evaluate,
)
from tests.kernels.test_layouts import LAYOUTS
from tpformer_kernels import AttentionOptions, attention, attention_with_lse

BACKENDS = ["triton", "torch"]


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    prove(Shape(), OPTIONS[name])


@pytest.mark.parametrize("options", [CAUSAL, EVERYTHING, replace(EVERYTHING, causal=False)], ids=["c", "e", "n"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, options: AttentionOptions) -> None:
    prove(SHAPES[name], options)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_groups(kv_heads: int) -> None:
    prove(Shape(1, 6, kv_heads, 20, 20), CAUSAL)


@pytest.mark.parametrize("d", [1, 12, 32, 48, 64, 80, 256])
def test_widths(d: int) -> None:
    prove(Shape(1, 2, 1, 18, 18, d), CAUSAL)


@pytest.mark.parametrize("name", ["causal", "everything"])
def test_fp16(name: str) -> None:
    prove(Shape(1), OPTIONS[name], torch.float16)


@pytest.mark.parametrize("name", ["causal", "everything"])
def test_real_blocks(name: str) -> None:
    """With the blocks of the tables, of which the last are not full."""
    shape, options = Shape(1, 2, 1, 139, 139, 32), OPTIONS[name]
    inputs = shape.inputs(torch.float16)
    result = evaluate(ours(options), inputs, 3)
    assert_near(result, exact(expected(shape, options), inputs, result), TOLERANCE[torch.float16])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_reference(name: str, dtype: torch.dtype) -> None:
    for shape in (Shape(), *SHAPES.values()):
        inputs = shape.inputs(dtype)
        result = evaluate(ours(OPTIONS[name], "torch"), inputs, 3)
        assert_near(result, exact(expected(shape, OPTIONS[name]), inputs, result), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [Shape(0), Shape(1, 2, 1, 0, 5), Shape(1, 2, 1, 5, 0)], ids=str)
def test_nothing(shape: Shape, backend: Any) -> None:
    q, k, v = (x.requires_grad_() for x in shape.inputs())
    o, lse = attention_with_lse(q, k, v, CAUSAL, backend=backend)
    assert torch.equal(o, torch.zeros(shape.b, shape.heads, shape.sq, shape.d, device=DEVICE))
    assert (lse == -torch.inf).all()
    o.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs_and_gradients(layout: str) -> None:
    shape = Shape(2, 2, 2, 5, 5)
    inputs = tuple(LAYOUTS[layout](x) for x in shape.inputs())
    dys = [
        LAYOUTS[layout](torch.randn(2, 2, 5, 16, device=DEVICE)),
        LAYOUTS[layout](torch.randn(2, 2, 5, device=DEVICE)),
    ]
    result = evaluate(ours(CAUSAL), inputs, 3, dys)
    assert_near(result, exact(expected(shape, CAUSAL), inputs, result), TOLERANCE[torch.float32])


@pytest.mark.parametrize("mask", range(1, 8))
def test_frozen_inputs(mask: int) -> None:
    inputs = Shape(1, 2, 1, 5, 5).inputs()
    whole = evaluate(ours(CAUSAL), inputs, 3)
    leaves = [x.detach().requires_grad_(bool(mask >> i & 1)) for i, x in enumerate(inputs)]
    torch.autograd.backward(ours(CAUSAL)(*leaves), whole.cotangents)
    for leaf, gradient in zip(leaves, whole.gradients, strict=True):
        assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, gradient)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_either_output_alone(backend: Any) -> None:
    """Whoever uses only lse, or only the output, gets its gradient; the other's is as if it were 0."""
    shape = Shape(1, 2, 1, 5, 5)
    inputs = shape.inputs()
    for i, trained in enumerate((3, 2)):  # no lse depends on v
        alone = evaluate(lambda *x, i=i: ours(CAUSAL, backend)(*x)[i], inputs, trained)
        dys = [y.double() for y in alone.cotangents]
        right = evaluate(lambda *x, i=i: expected(shape, CAUSAL)(*x)[i], [x.double() for x in inputs], trained, dys)
        assert_near(alone, right, TOLERANCE[torch.float32])


def test_parts_of_the_keys_are_put_together_by_lse() -> None:
    """As ring attention does: with the gradients of both outputs, the parts give the whole's."""
    shape = Shape(1, 2, 1, 7, 12)

    def in_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            attention_with_lse(q, a, b, backend="triton") for a, b in zip(k.split(5, 2), v.split(5, 2), strict=True)
        ]
        weights = torch.stack([lse for _, lse in parts]).softmax(0)
        return sum(w.unsqueeze(-1) * o for w, (o, _) in zip(weights, parts, strict=True))

    inputs = shape.inputs()
    result = evaluate(in_parts, inputs, 3)
    right = exact(lambda *x: expected(shape, AttentionOptions())(*x)[0], inputs, result)
    assert_near(result, right, TOLERANCE[torch.float32])


@pytest.mark.parametrize("causal", [True, False])
def test_twice_the_error_of_torch_s_own(causal: bool) -> None:
    q, k, v = Shape(1, 4, 2, 40, 40, 32).inputs(torch.float16)
    options = AttentionOptions(causal=causal)
    mine = attention(q, k, v, options, backend="triton")
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    theirs, right = (
        F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), is_causal=causal)
        for wide in (torch.float16, torch.float64)
    )
    assert_as_good_as_torch(mine, theirs, right, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_large_scores() -> None:
    q, k, v = Shape(1, 1, 1, 4, 4).inputs()
    mine = attention(300 * q, 300 * k, v, CAUSAL, backend="triton")
    assert_near(
        evaluate(lambda: mine, (), 0),
        evaluate(lambda: expected_softmax(300 * q.double(), 300 * k.double(), v.double()), (), 0),
        1e-5,
    )


def expected_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_a_second_derivative_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in Shape(1, 1, 1, 3, 3).inputs())
    y = attention(q, k, v, CAUSAL, backend="triton").square().sum()
    (dq,) = torch.autograd.grad(y, q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.square().sum().backward()
