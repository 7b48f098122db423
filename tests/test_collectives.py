"""The doors of a tensor-parallel region, and the collectives beside them: what goes forward and what comes back."""

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.distributed import Ranks
from tests.layers.prove import meshes, noise
from tpformer import Axis, Mesh, trace_communication
from tpformer.collectives import (
    all_reduce_,
    enter_parallel,
    gather_features,
    gather_stack,
    leave_parallel,
    raise_together,
    split_features,
    split_sequence,
    start_all_reduce,
    start_gather_sequence,
    start_scatter_sequence,
)

B, S, D = 2, 8, 12
Result = tuple[int, int, npt.NDArray[Any], npt.NDArray[Any]]  # tp, tp rank, output, gradient


def of(rank: int, name: str, *shape: int) -> Tensor:
    """What one rank brings; every process knows what the others bring."""
    return noise(f"{name} {rank}", *shape)


def total(tp: int, name: str, *shape: int) -> Tensor:
    return torch.stack([of(r, name, *shape) for r in range(tp)]).sum(0)


def joined(tp: int, name: str, *shape: int, dim: int) -> Tensor:
    return torch.cat([of(r, name, *shape) for r in range(tp)], dim)


def apply(function: str, mesh: Mesh, x: Tensor) -> Tensor:
    if function == "enter_parallel":
        return enter_parallel(x, mesh)
    if function == "leave_parallel":
        return leave_parallel(x, mesh)
    return {"gather_features": gather_features, "split_features": split_features}[function](x, mesh.tp)


def shapes(function: str, mesh: Mesh) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a rank's input and output."""
    tp = mesh.tp.size
    whole, tokens, features = (B, S, D), (B, S // tp if mesh.sequence_parallel else S, D), (B, S, D // tp)
    return {
        "enter_parallel": (tokens, whole),
        "leave_parallel": (whole, tokens),
        "gather_features": (features, whole),
        "split_features": (whole, features),
    }[function]


def run(function: str, strided: bool) -> dict[str, Result]:
    results = {}
    for layout, mesh in meshes().items():
        shape, out_shape = shapes(function, mesh)
        x, dy = of(mesh.tp.rank, "x", *shape), of(mesh.tp.rank, "dy", *out_shape)
        if strided:
            x, dy = (t.transpose(0, 2).contiguous().transpose(0, 2) for t in (x, dy))
        x.requires_grad_()
        x_before, dy_before = x.detach().clone(), dy.clone()
        y = apply(function, mesh, x)
        y.backward(dy)
        assert torch.equal(x, x_before), "the input was written to"
        assert torch.equal(dy, dy_before), "the incoming gradient was written to"
        assert x.grad is not None
        results[layout] = (mesh.tp.size, mesh.tp.rank, y.detach().numpy(), x.grad.numpy())
    return results


Expected = Callable[[int, int], tuple[Tensor, Tensor]]  # of tp and rank: output and gradient
EXPECTED: dict[tuple[str, bool], Expected] = {
    ("enter_parallel", False): lambda tp, r: (of(r, "x", B, S, D), total(tp, "dy", B, S, D)),
    ("enter_parallel", True): lambda tp, r: (
        joined(tp, "x", B, S // tp, D, dim=1),
        total(tp, "dy", B, S, D).chunk(tp, dim=1)[r],
    ),
    ("leave_parallel", False): lambda tp, r: (total(tp, "x", B, S, D), of(r, "dy", B, S, D)),
    ("leave_parallel", True): lambda tp, r: (
        total(tp, "x", B, S, D).chunk(tp, dim=1)[r],
        joined(tp, "dy", B, S // tp, D, dim=1),
    ),
    **{
        ("gather_features", form): lambda tp, r: (
            joined(tp, "x", B, S, D // tp, dim=2),
            of(r, "dy", B, S, D).chunk(tp, dim=2)[r],
        )
        for form in (False, True)
    },
    **{
        ("split_features", form): lambda tp, r: (
            of(r, "x", B, S, D).chunk(tp, dim=2)[r],
            joined(tp, "dy", B, S, D // tp, dim=2),
        )
        for form in (False, True)
    },
}


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("function", ["enter_parallel", "leave_parallel", "gather_features", "split_features"])
def test_forward_and_backward(ranks: Ranks, function: str, strided: bool) -> None:
    for results in [run(function, strided), *ranks(run, 4, function, strided)]:
        for layout, (tp, rank, y, dx) in results.items():
            expected = EXPECTED[function, "sequence" in layout](tp, rank)
            for mine, whole in zip((y, dx), expected, strict=True):
                torch.testing.assert_close(torch.from_numpy(mine), whole, rtol=1e-14, atol=1e-14, msg=layout)


def run_shared_gradient() -> list[float]:
    """Two readers of one gradient: y = enter(x) + 2 x, where autograd hands one tensor to both."""
    errors = []
    for layout, mesh in meshes().items():
        if "sequence" in layout:
            continue
        x = of(0, "x", B, S, D).requires_grad_()
        (enter_parallel(x, mesh) + x).backward(of(0, "dy", B, S, D))
        assert x.grad is not None
        errors.append((x.grad - (mesh.tp.size + 1) * of(0, "dy", B, S, D)).abs().max().item())
    return errors


def test_a_gradient_that_others_still_need_is_not_reduced_in_place(ranks: Ranks) -> None:
    for errors in ranks(run_shared_gradient, 4):
        assert len(errors) == 2
        assert max(errors) < 1e-13


def run_primitives() -> list[Any]:
    answers = []
    for mesh in (m for layout, m in meshes().items() if "sequence" not in layout):
        tp = mesh.tp
        x = of(tp.rank, "x", B, S, D)
        answers.append(
            (
                tp.size,
                tp.rank,
                all_reduce_(x.clone(), tp).numpy(),
                start_all_reduce(x.clone(), tp).wait().numpy(),
                start_gather_sequence(x, tp).wait().numpy(),
                start_scatter_sequence(x, tp).wait().numpy(),
                gather_stack(x, tp).numpy(),
                start_gather_sequence(x[0], tp).wait().numpy(),  # (s, d)
                start_scatter_sequence(x[0], tp).wait().numpy(),
            )
        )
    return answers


def test_the_collectives_underneath(ranks: Ranks) -> None:
    for answers in ranks(run_primitives, 4):
        assert [tp for tp, *_ in answers] == [2, 4]
        for tp, rank, *arrays in answers:
            summed, long = total(tp, "x", B, S, D), joined(tp, "x", B, S, D, dim=1)
            mine = summed.chunk(tp, dim=1)[rank]
            stacked = torch.stack([of(r, "x", B, S, D) for r in range(tp)])
            expected = [summed, summed, long, mine, stacked, long[0], mine[0]]
            for array, value in zip(arrays, expected, strict=True):
                torch.testing.assert_close(torch.from_numpy(array), value, rtol=1e-14, atol=1e-14)


def test_alone_nothing_is_copied_or_communicated() -> None:
    x, tp = noise("x", B, S, D), Axis("tp")
    for mesh in (Mesh(), Mesh(sequence_parallel=True)):
        with trace_communication() as trace:
            assert enter_parallel(x, mesh) is x
            assert leave_parallel(x, mesh) is x
            assert gather_features(x, tp) is x
            assert split_features(x, tp) is x
            assert all_reduce_(x, tp) is x
            assert start_all_reduce(x, tp).wait() is x
            assert gather_stack(x, tp).shape == (1, B, S, D)
        assert trace.calls == []


def test_split_sequence_is_one_part_a_rank() -> None:
    x = noise("x", 3, B, S, D)
    parts = split_sequence(x, Axis("tp", 4))
    assert parts.shape == (4, 3, B, S // 4, D)
    assert parts.data_ptr() == x.data_ptr()  # a view
    assert torch.equal(torch.cat(list(parts), dim=-2), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, mesh: leave_parallel(x, mesh), r"sequence length \(10\) must be divisible by tp \(4\)"),
        (lambda x, mesh: split_sequence(x, mesh.tp), r"sequence length \(10\) must be divisible by tp \(4\)"),
        (lambda x, mesh: split_features(x, mesh.tp), r"features \(6\) must be divisible by tp \(4\)"),
    ],
    ids=["leave_parallel", "split_sequence", "split_features"],
)
def test_what_does_not_divide_is_named(call: Callable[[Tensor, Mesh], Tensor], message: str) -> None:
    mesh = Mesh(tp=Axis("tp", 4), sequence_parallel=True)  # refused before any communication
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 10, 6), mesh)


ERRORS: dict[str, dict[int, BaseException]] = {
    "none": {},
    "file": {2: FileNotFoundError("no disk ä")},
    "value": {0: ValueError("wrong")},
    "key": {3: KeyError("x")},
    "two": {1: ValueError("first"), 3: OSError("second")},
    "silent": {1: ValueError()},
    "long": {1: ValueError("ä" * 5000)},
}


def run_errors(name: str) -> tuple[str, str]:
    """What this rank raises, if each rank brings the error that it has."""
    mesh = Mesh.create(tp=4)
    try:
        raise_together(ERRORS[name].get(mesh.tp.rank), mesh.tp)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("none", ("", "")),
        ("file", ("OSError", "no disk ä")),
        ("value", ("ValueError", "wrong")),
        ("key", ("ValueError", "'x'")),
        ("two", ("ValueError", "first")),
        ("silent", ("ValueError", "")),
        ("long", ("ValueError", "ä" * 2000)),
    ],
)
def test_one_rank_s_error_is_raised_by_all(ranks: Ranks, name: str, others: tuple[str, str]) -> None:
    for rank, (kind, text) in enumerate(ranks(run_errors, 4, name)):
        own = ERRORS[name].get(rank)
        if own is None:
            assert kind == others[0]
            assert text == others[1] or (text.startswith(others[1]) and name == "long")
        else:
            assert (kind, text) == (type(own).__name__, str(own))


def test_alone_an_error_is_just_raised() -> None:
    error = OSError("disk")
    raise_together(None, Axis("tp"))
    with pytest.raises(OSError, match="disk") as caught:
        raise_together(error, Axis("tp"))
    assert caught.value is error
