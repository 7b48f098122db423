"""What does not need a gradient gets none, changes no other and costs nothing; dtypes may be mixed."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.cases import TRAINED
from tests.kernels.support import TOLERANCE, assert_near, close, evaluate, exact, guarded, outputs_of

SIZE = (3, 6)


def subsets() -> Iterator[tuple[str, int]]:
    """Each op with each set of inputs that need gradients, as bits."""
    for name, case in TRAINED.items():
        yield from ((name, mask) for mask in range(1, 1 << case.trained))


def leaves_of(inputs: Sequence[Tensor], mask: int) -> list[Tensor]:
    return [x.detach().requires_grad_(bool(mask >> i & 1)) for i, x in enumerate(inputs)]


class Launched(TorchDispatchMode):
    """The names of our operators that were called, and how many numbers they gave back."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func.namespace == "tpformer":
            self.calls.append((func._opname, [x.numel() for x in outputs_of(result)]))
        return result


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("name", "mask"), list(subsets()))
def test_frozen_inputs(name: str, mask: int, backend: str) -> None:
    case = TRAINED[name]
    inputs = case.inputs(*SIZE, torch.float32)
    whole = evaluate(lambda *x: case.ours(*x, backend=backend), inputs, case.trained)
    leaves = leaves_of(inputs, mask)
    outputs = outputs_of(case.ours(*leaves, backend=backend))
    pairs = [(y, dy) for y, dy in zip(outputs, whole.cotangents, strict=True) if y.requires_grad]
    torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
    for leaf, expected in zip(leaves, whole.gradients, strict=False):
        assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, expected)  # type: ignore[arg-type]


FROZEN_COSTS = {
    "rms_norm": (0b01, [("norm_backward", [18, 0, 0])]),
    "add_rms_norm": (0b011, [("norm_backward", [18, 0, 0])]),
    "layer_norm": (0b001, [("norm_backward", [18, 0, 0])]),
    "add_layer_norm": (0b1011, [("norm_backward", [18, 0, 6])]),
    "bias_gelu gelu": (0b01, [("bias_gelu_backward", [18, 0])]),
    "dropout_add": (0b10, []),
}
"""Which inputs need gradients, and the operators that backward then calls, with the sizes of their outputs."""


def backward_of(name: str, mask: int) -> tuple[list[tuple[str, list[int]]], int]:
    """The operators that backward calls and the bytes that it allocates."""
    case = TRAINED[name]
    outputs = outputs_of(case.ours(*leaves_of(case.inputs(*SIZE, torch.float32), mask), backend="triton"))
    with guarded() as guard, Launched() as launched:
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    return launched.calls, guard.bytes()


@pytest.mark.parametrize("name", FROZEN_COSTS)
def test_what_is_frozen_costs_nothing(name: str) -> None:
    mask, calls = FROZEN_COSTS[name]
    launched, size = backward_of(name, mask)
    assert launched == calls
    assert size < backward_of(name, (1 << TRAINED[name].trained) - 1)[1]


@pytest.mark.parametrize("name", TRAINED)
def test_without_gradients_nothing_is_kept(name: str) -> None:
    case = TRAINED[name]
    assert all(y.grad_fn is None for y in outputs_of(case.ours(*case.inputs(*SIZE, torch.float32), backend="triton")))


HALF, FULL = torch.float16, torch.float32
MIXED = {  # dtypes of the inputs and of the outputs
    "rms_norm": ([HALF, FULL], [HALF]),
    "add_rms_norm": ([HALF, FULL, FULL], [HALF, FULL]),
    "layer_norm": ([HALF, FULL, FULL], [HALF]),
    "add_layer_norm": ([HALF, FULL, HALF, FULL], [HALF, FULL]),
    "split_and_rotate": ([HALF, FULL, FULL], [HALF, HALF, HALF]),
    "apply_rope": ([HALF, HALF, FULL, FULL], [HALF, HALF]),
    "bias_gelu gelu": ([HALF, FULL], [HALF]),
    "dropout_add": ([HALF, FULL], [FULL]),
}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", MIXED)
def test_mixed_dtypes(name: str, backend: str) -> None:
    case, (dtypes, expected) = TRAINED[name], MIXED[name]
    inputs = [x.to(dtype) for x, dtype in zip(case.inputs(*SIZE, FULL), dtypes, strict=True)]
    result = evaluate(lambda *x: case.ours(*x, backend=backend), inputs, case.trained)
    assert [y.dtype for y in result.outputs] == expected
    assert [g.dtype for g in result.gradients] == dtypes[: case.trained]
    assert_near(result, exact(case.torchs, inputs, case.trained, result.cotangents), TOLERANCE[HALF])


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", ["add_rms_norm", "add_layer_norm", "dropout_add"])
def test_an_fp32_residual_stays_fp32(name: str, backend: str) -> None:
    """The sum is as exact as the residual, however coarse what is added."""
    case = TRAINED[name]
    x, residual, *others = case.inputs(*SIZE, FULL)
    result = evaluate(lambda *x: case.ours(*x, backend=backend), [x.to(HALF), 100 * residual, *others], case.trained)
    expected = exact(case.torchs, [x.to(HALF), 100 * residual, *others], case.trained, result.cotangents)
    close(result.outputs[-1], expected.outputs[-1], 1e-6 if "norm" in name else TOLERANCE[FULL])
    close(result.gradients[1], expected.gradients[1], TOLERANCE[FULL])


REFUSING = [(name, backend) for name in TRAINED for backend in ("triton", "torch")]
REFUSING = [(name, backend) for name, backend in REFUSING if not (name.startswith("bias_gelu") and backend == "torch")]


@pytest.mark.parametrize(("name", "backend"), REFUSING)
def test_a_second_derivative_is_refused(name: str, backend: str) -> None:
    """Rather than silently 0: none of these backwards can be differentiated (in plain torch, GELU's can)."""
    case = TRAINED[name]
    leaves = leaves_of(case.inputs(*SIZE, torch.float32)[: case.trained], -1)
    outputs = outputs_of(case.ours(*leaves, *case.inputs(*SIZE, torch.float32)[case.trained :], backend=backend))
    losses = [y.square().sum() for y in outputs]
    penalty = torch.stack([g.square().sum() for g in torch.autograd.grad(losses, leaves, create_graph=True)]).sum()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        penalty.backward()
