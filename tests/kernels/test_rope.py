"""apply_rope against complex multiplication and transformers' own: outputs and gradients, odd sizes, strides."""

import pytest
import torch
from torch import Tensor

from tpformer_kernels import apply_rope, split_and_rotate

SHAPES = [(1, 1, 1, 2), (2, 5, 3, 6), (1, 7, 1, 16), (3, 1, 2, 34)]


def angles(length: int, width: int) -> Tensor:
    """Arbitrary angles, one for each position and pair: (length, 1, width/2)."""
    return 7 * torch.randn(length, 1, width // 2, dtype=torch.float64)


def reference(x: Tensor, angle: Tensor) -> Tensor:
    """The pair (x[i], x[i + k/2]) as one complex number, turned by the angle."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_a_rotation_in_the_complex_plane(shape: tuple[int, int, int, int]) -> None:
    angle = angles(shape[1], shape[3])
    x, dy = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape, dtype=torch.float64)
    for ours in apply_rope(x, x, angle.cos(), angle.sin()):
        theirs = reference(x, angle)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        (mine,), (expected,) = torch.autograd.grad(ours, x, dy), torch.autograd.grad(theirs, x, dy)
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_finite_differences(shape: tuple[int, int, int, int]) -> None:
    cos, sin = torch.randn(2, shape[1], 1, shape[3] // 2, dtype=torch.float64)  # not even a rotation
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    k = torch.randn(*shape[:2], 2, shape[3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: apply_rope(q, k, cos, sin), (x, k))


def test_is_the_rotation_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    angle = angles(5, 8)
    q, k = torch.randn(2, 2, 5, 3, 8, dtype=torch.float64)
    k = k[:, :, :1]
    whole = torch.cat([angle, angle], dim=-1).transpose(0, 1)  # theirs: (1, s, k)
    theirs = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), whole.cos(), whole.sin())
    for mine, expected in zip(apply_rope(q, k, angle.cos(), angle.sin()), theirs, strict=True):
        torch.testing.assert_close(mine, expected.transpose(1, 2), rtol=1e-12, atol=0)


def test_strided_views_of_a_fused_projection() -> None:
    angle = angles(5, 8)
    fused = torch.randn(2, 5, 4, 8, dtype=torch.float64)
    x = fused[..., 1::2, :].requires_grad_()
    dy = torch.randn(5, 2, 2, 8, dtype=torch.float64).transpose(0, 1)
    y, other = apply_rope(x, fused[..., :1, :], angle.cos(), angle.sin())
    assert y.is_contiguous() and other.is_contiguous()
    torch.testing.assert_close(other, reference(fused[..., :1, :], angle), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y, reference(x, angle), rtol=1e-12, atol=1e-12)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, reference(dy, -angle), rtol=1e-12, atol=1e-12)


def test_bf16_inputs_give_bf16_outputs_near_the_exact_ones() -> None:
    angle = angles(5, 8)
    x, dy = torch.randn(2, 2, 5, 3, 8).bfloat16()
    x.requires_grad_()
    y, _ = apply_rope(x, dy, angle.cos().bfloat16(), angle.sin().bfloat16())
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == dx.dtype == torch.bfloat16
    # two products and a sum, each rounded, of factors that were rounded before: a few units of 2^-8
    for ours, exact in ((y, reference(x.detach().double(), angle)), (dx, reference(dy.double(), -angle))):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=4 * 2**-8 * exact.abs().max().item())


def test_keeps_nothing_but_the_table() -> None:
    cos, sin = torch.randn(2, 5, 1, 4)
    q, k = torch.randn(2, 2, 5, 3, 8, requires_grad=True)
    for y in apply_rope(q, k, cos, sin):
        assert {t.data_ptr() for t in y.grad_fn.saved_tensors} == {cos.data_ptr(), sin.data_ptr()}  # type: ignore[union-attr]


def test_splits_each_kv_head_into_its_queries_key_and_value() -> None:
    angle = angles(5, 8)
    qkv = torch.randn(2, 5, 3, 4, 8, dtype=torch.float64, requires_grad=True)  # two queries, a key, a value
    q, k, v = split_and_rotate(qkv, angle.cos(), angle.sin())
    for head in range(3):
        for i in range(2):
            torch.testing.assert_close(q[:, :, 2 * head + i], reference(qkv[:, :, head, i : i + 1], angle)[:, :, 0])
    torch.testing.assert_close(k, reference(qkv[..., 2, :], angle), rtol=1e-12, atol=1e-12)
    assert torch.equal(v, qkv[..., 3, :]) and v.data_ptr() == qkv[..., 3, :].data_ptr()
    dq, dk, dv = (torch.randn(t.shape, dtype=torch.float64) for t in (q, k, v))
    (dqkv,) = torch.autograd.grad((q, k, v), qkv, (dq, dk, dv))
    torch.testing.assert_close(dqkv[..., :2, :].flatten(2, 3), reference(dq, -angle), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dqkv[..., 2, :], reference(dk, -angle), rtol=1e-12, atol=1e-12)
    assert torch.equal(dqkv[..., 3, :], dv)
