"""Whatever the memory of inputs and gradients looks like, however little there is, the numbers are right."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import CASES, TRAINED
from tests.kernels.support import TOLERANCE, Result, assert_near, close, evaluate, exact, guarded, outputs_of

SIZE = (3, 6)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced columns": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every second column": lambda x: x.repeat_interleave(2, -1)[..., 1::2],
    "every second row": lambda x: x.repeat_interleave(2, 0)[1::2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else x,
    "one row, expanded": lambda x: x[:1].clone().expand_as(x),
    "one column, expanded": lambda x: x[..., :1].clone().expand_as(x),
    "one number, expanded": lambda x: x.flatten()[0].clone().expand_as(x),
    "unaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
}

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def ours(name: str, *inputs: Tensor) -> tuple[Tensor, ...]:
    return outputs_of(CASES[name].ours(*inputs, backend="triton"))


def check(name: str, result: Result, inputs: list[Tensor]) -> None:
    case = CASES[name]
    assert_near(result, exact(case.torchs, inputs, case.trained, result.cotangents), TOLERANCE[torch.float32])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_inputs(name: str, layout: str) -> None:
    case = CASES[name]
    made = case.inputs(*SIZE, torch.float32)
    inputs = [LAYOUTS[layout](x) for x in made]
    if "layer_norm" in name and layout in ("one column, expanded", "one number, expanded"):
        inputs[0] = made[0]  # a row of equal numbers has no variance: what is normed is rounding
    check(name, evaluate(lambda *x: ours(name, *x), inputs, case.trained), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TRAINED)
def test_incoming_gradients(name: str, layout: str) -> None:
    case = TRAINED[name]
    inputs = list(case.inputs(*SIZE, torch.float32))
    dys = [LAYOUTS[layout](torch.randn_like(y)) for y in ours(name, *inputs)]
    before = [dy.clone() for dy in dys]
    check(name, evaluate(lambda *x: ours(name, *x), inputs, case.trained, dys), inputs)
    assert all(torch.equal(dy, old) for dy, old in zip(dys, before, strict=True))


@pytest.mark.parametrize("name", TRAINED)
def test_the_sum_of_one_output(name: str) -> None:
    case = TRAINED[name]
    inputs = case.inputs(*SIZE, torch.float32)

    def gradients(function: Callable[..., Sequence[Tensor]], i: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).detach().requires_grad_(n < case.trained) for n, x in enumerate(inputs)]
        y = outputs_of(function(*leaves))[i].sum()
        return torch.autograd.grad(y, leaves[: case.trained], allow_unused=True, materialize_grads=True)

    for i in range(len(ours(name, *inputs))):
        mine = gradients(lambda *x: ours(name, *x), i, torch.float32)
        for x, expected in zip(mine, gradients(case.torchs, i, torch.float64), strict=True):
            close(x, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", TRAINED)
def test_backward_twice(name: str) -> None:
    case = TRAINED[name]
    leaves = [x.requires_grad_(i < case.trained) for i, x in enumerate(case.inputs(*SIZE, torch.float32))]
    outputs = ours(name, *leaves)
    dys = [torch.randn_like(y) for y in outputs]
    first, second, anew = (
        torch.autograd.grad(y, leaves[: case.trained], dys, retain_graph=True)
        for y in (outputs, outputs, ours(name, *leaves))
    )
    for x, y, z in zip(first, second, anew, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


@pytest.mark.parametrize("size", [(0, 6), (0, 1)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_no_rows(name: str, size: tuple[int, int]) -> None:
    case = CASES[name]
    inputs = case.inputs(*size, torch.float32)
    with guarded():
        result = evaluate(lambda *x: ours(name, *x), inputs, case.trained)
    expected = exact(case.torchs, inputs, case.trained, result.cotangents)
    assert [y.shape for y in result.outputs] == [y.shape for y in expected.outputs]
    for x, gradient in zip(inputs, result.gradients, strict=False):
        assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("gated", "bias_gelu", "dropout"))])
def test_no_columns(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs(3, 0, torch.float32)
    result = evaluate(lambda *x: ours(name, *x), inputs, case.trained)
    assert all(y.shape[-1] == 0 for y in (*result.outputs, *result.gradients))
