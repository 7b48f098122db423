"""The two linear layers against torch.nn.Linear at any layout, what they communicate, and what they refuse."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import Ranks
from tests.layers.prove import Results, evaluate, fill, gradient, meshes, noise, on_layouts, prove, take
from tpformer import Axis, ColumnParallelLinear, Mesh, RowParallelLinear, trace_communication

D, F = 12, 16


@dataclass(frozen=True)
class Case:
    """A layer, how its input and output lie over the ranks, and the shape of its input."""

    kind: type[ColumnParallelLinear] | type[RowParallelLinear]
    parts: tuple[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = (2, 8, D)
    strided: bool = False
    apart: bool = False

    @property
    def interleave(self) -> int:
        return self.options.get("interleave", 1)

    @property
    def outputs(self) -> int:
        return self.interleave if self.apart else 1

    def build(self, mesh: Mesh, dtype: torch.dtype) -> ColumnParallelLinear | RowParallelLinear:
        layer = self.kind(D, F, mesh=mesh, **self.options).to(dtype)
        fill(layer, mesh)
        return layer

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Whole x and dy; strided: stored with their first two dims exchanged."""
        out = (self.outputs, F // self.outputs) if self.apart else (F,)
        x, dy = noise("x", *self.shape), noise("dy", *self.shape[:-1], *out)
        return (lay_out(x), lay_out(dy)) if self.strided else (x, dy)


def lay_out(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


Column, Row = ColumnParallelLinear, RowParallelLinear
CASES = {
    "column": Case(Column, ("tokens", "features")),
    "column without bias": Case(Column, ("tokens", "features"), {"bias": False}),
    "column gathered": Case(Column, ("tokens", "whole"), {"gather_output": True}),
    "column packed": Case(Column, ("tokens", "features"), {"interleave": 2}),
    "column packed without bias": Case(Column, ("tokens", "features"), {"interleave": 2, "bias": False}),
    "column packed gathered": Case(Column, ("tokens", "whole"), {"interleave": 2, "gather_output": True}),
    "column apart": Case(Column, ("tokens", "features"), {"interleave": 2}, apart=True),
    "column apart without bias": Case(Column, ("tokens", "features"), {"interleave": 2, "bias": False}, apart=True),
    "column apart gathered": Case(Column, ("tokens", "whole"), {"interleave": 2, "gather_output": True}, apart=True),
    "column apart in four": Case(Column, ("tokens", "features"), {"interleave": 4}, apart=True),
    "column apart, but one": Case(Column, ("tokens", "features"), apart=True),
    "column on (s, d)": Case(Column, ("tokens", "features"), shape=(8, D)),
    "column on (a, b, s, d)": Case(Column, ("tokens", "features"), shape=(2, 3, 4, D)),
    "column strided": Case(Column, ("tokens", "features"), strided=True),
    "column strided gathered": Case(Column, ("tokens", "whole"), {"gather_output": True}, strided=True),
    "column packed strided": Case(Column, ("tokens", "features"), {"interleave": 2}, strided=True),
    "column apart strided": Case(Column, ("tokens", "features"), {"interleave": 2}, strided=True, apart=True),
    "row": Case(Row, ("features", "tokens")),
    "row without bias": Case(Row, ("features", "tokens"), {"bias": False}),
    "row of a whole input": Case(Row, ("whole", "tokens"), {"input_is_parallel": False}),
    "row on (s, d)": Case(Row, ("features", "tokens"), shape=(8, D)),
    "row on (a, b, s, d)": Case(Row, ("features", "tokens"), shape=(2, 3, 4, D)),
    "row strided": Case(Row, ("features", "tokens"), strided=True),
    "row of a whole strided input": Case(Row, ("whole", "tokens"), {"input_is_parallel": False}, strided=True),
}


def forward_of(layer: ColumnParallelLinear | RowParallelLinear, case: Case) -> Callable[[Tensor], Tensor]:
    """The layer, or its outputs apart as one tensor (..., interleave, f)."""

    def forward(x: Tensor) -> Tensor:
        assert isinstance(layer, ColumnParallelLinear)
        y = layer(x, apart=True)
        assert len(y) == case.outputs
        return torch.stack(y, dim=-2)

    return forward if case.apart else layer


def run(name: str) -> Results:
    case = CASES[name]

    def on(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
        layer = case.build(mesh, dtype)
        x, dy = (t.to(dtype) for t in case.tensors())
        return evaluate(layer, x, dy, mesh, forward=forward_of(layer, case), kinds=case.parts)

    return on_layouts(on)


def reference(case: Case) -> dict[str, Tensor]:
    linear = torch.nn.Linear(D, F, bias=case.options.get("bias", True)).double()
    fill(linear, Mesh())
    x, dy = case.tensors()
    y = linear(x.requires_grad_())
    if case.apart:  # output i has the rows i, i + interleave, ...
        y = torch.stack([y[..., i :: case.outputs] for i in range(case.outputs)], dim=-2)
    y.backward(dy)
    return {"y": y, "dx": gradient(x), **{name: gradient(p) for name, p in linear.named_parameters()}}


@pytest.mark.parametrize("name", CASES)
def test_is_torch_nn_linear(ranks: Ranks, name: str) -> None:
    prove(ranks, run, reference(CASES[name]), name)


NONE: list[str] = []
COUNTS = {  # case, frozen part -> what is communicated, and the same under sequence parallelism
    ("column", ""): (
        ["backward all_reduce"],
        ["forward all_gather", "backward all_gather", "backward reduce_scatter"],
    ),
    ("column", "weight"): (["backward all_reduce"], ["forward all_gather", "backward reduce_scatter"]),
    ("column", "input"): (NONE, ["forward all_gather", "backward all_gather"]),
    ("column packed", ""): (
        ["backward all_reduce"],
        ["forward all_gather", "backward all_gather", "backward reduce_scatter"],
    ),
    ("column apart", ""): (
        ["backward all_reduce"],
        ["forward all_gather", "backward all_gather", "backward reduce_scatter"],
    ),
    ("column apart", "weight"): (["backward all_reduce"], ["forward all_gather", "backward reduce_scatter"]),
    ("column apart", "input"): (NONE, ["forward all_gather", "backward all_gather"]),
    ("column gathered", ""): (
        ["forward all_gather", "backward all_reduce"],
        ["forward all_gather", "forward all_gather", "backward all_gather", "backward reduce_scatter"],
    ),
    ("row", ""): (["forward all_reduce"], ["forward reduce_scatter", "backward all_gather"]),
    ("row", "weight"): (["forward all_reduce"], ["forward reduce_scatter", "backward all_gather"]),
    ("row", "input"): (["forward all_reduce"], ["forward reduce_scatter", "backward all_gather"]),
    ("row of a whole input", ""): (
        ["forward all_reduce", "backward all_gather"],
        ["forward reduce_scatter", "backward all_gather", "backward all_gather"],
    ),
}


def run_counts(name: str, frozen: str) -> dict[str, list[str]]:
    case, counts = CASES[name], {}
    for layout, mesh in meshes().items():
        layer = case.build(mesh, torch.float32)
        layer.weight.requires_grad_(frozen != "weight")
        x, dy = (take(t, part, mesh).float() for t, part in zip(case.tensors(), case.parts, strict=True))
        x = x.detach().requires_grad_(frozen != "input")
        with trace_communication() as trace:
            forward_of(layer, case)(x).backward(dy)
        assert (layer.weight.grad is None) == (frozen == "weight")
        assert (x.grad is None) == (frozen == "input")
        counts[layout] = [f"{call.phase} {call.op}" for call in trace.calls]
    return counts


@pytest.mark.parametrize(("name", "frozen"), COUNTS, ids=str)
def test_communicates_no_more_than_it_must(ranks: Ranks, name: str, frozen: str) -> None:
    plain, sequence_parallel = COUNTS[name, frozen]
    assert set(map(tuple, run_counts(name, frozen).values())) == {()}
    for counts in ranks(run_counts, 4, name, frozen):
        for layout, calls in counts.items():
            assert calls == (sequence_parallel if "sequence" in layout else plain), layout


def run_without_gradient() -> dict[str, float]:
    """How far a frozen weight's dx, and a frozen input's dW, are from those of a layer with nothing frozen."""
    errors = {}
    for layout, mesh in meshes().items():
        for name in ("column", "row", "column packed", "column apart"):
            case = CASES[name]
            x, dy = (take(t, part, mesh).detach() for t, part in zip(case.tensors(), case.parts, strict=True))
            gradients = {}
            for frozen in ("", "weight", "input"):
                layer = case.build(mesh, torch.float64)
                layer.weight.requires_grad_(frozen != "weight")
                x = x.detach().requires_grad_(frozen != "input")
                forward_of(layer, case)(x).backward(dy)
                gradients[frozen] = {"x": x.grad, "W": layer.weight.grad}
            dx = gradients[""]["x"] - gradients["weight"]["x"]  # type: ignore[operator]
            dweight = gradients[""]["W"] - gradients["input"]["W"]  # type: ignore[operator]
            errors[f"{name}, {layout}"] = max(dx.abs().max().item(), dweight.abs().max().item())
    return errors


def test_freezing_one_part_does_not_change_the_gradient_of_the_other(ranks: Ranks) -> None:
    for errors in [run_without_gradient(), *ranks(run_without_gradient, 4)]:
        assert max(errors.values()) == 0, errors


def four(rank: int = 0) -> Mesh:
    """A mesh of tp 4, good for building only."""
    return Mesh(tp=Axis("tp", 4, rank))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Column(8, 6, mesh=four()), r"out_features \(6\) must be divisible by tp \(4\)"),
        (lambda: Column(8, 9, interleave=2), r"out_features \(9\) must be divisible by interleave \(2\)"),
        (lambda: Row(6, 8, mesh=four()), r"in_features \(6\) must be divisible by tp \(4\)"),
    ],
    ids=["column", "interleave", "row"],
)
def test_sizes_that_do_not_divide_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_each_rank_holds_its_part_only() -> None:
    for rank in range(4):
        column, row = Column(8, 16, mesh=four(rank)), Row(16, 8, mesh=four(rank))
        assert column.weight.shape == (4, 8)
        assert column.bias.shape == (4,)
        assert row.weight.shape == (8, 4)
        assert row.bias.shape == (8,)


def run_biased_on_every_rank() -> list[float]:
    """How far a sum of ranks that each add the bias is from the layer's output and three biases more."""
    mesh = meshes()["tp 4"]
    layer = CASES["row"].build(mesh, torch.float64)
    x = take(CASES["row"].tensors()[0], "features", mesh)
    wrong = torch.nn.functional.linear(x, layer.weight, layer.bias).detach()
    dist.all_reduce(wrong)
    return (wrong - layer(x) - 3 * layer.bias).abs().flatten().tolist()


def test_the_row_bias_is_added_once(ranks: Ranks) -> None:
    """Negative control: added before the sum it would be counted by every rank."""
    for excess in ranks(run_biased_on_every_rank, 4):
        assert max(excess) < 1e-12


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_a_batch_may_be_empty(kind: type[ColumnParallelLinear] | type[RowParallelLinear], backend: Any) -> None:
    layer, x = kind(D, F, backend=backend), torch.empty(0, 3, D, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 3, F)
    assert gradient(x).shape == x.shape
    assert not any(gradient(p).any() for p in layer.parameters())


class Zeros(TorchDispatchMode):
    """Notes the shapes of tensors that are filled with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.zeros.default:
            self.shapes.append(args[0])
        return func(*args, **(kwargs or {}))


def test_backward_makes_no_zeros_for_an_activation_that_has_no_gradient() -> None:
    x = torch.randn(2, 3, D, requires_grad=True)
    y, _ = ColumnParallelLinear(D, F, backend="triton")(x, activation="gelu")
    with Zeros() as zeros:
        torch.zeros(1)
        y.sum().backward()
    assert zeros.shapes == [[1]]
