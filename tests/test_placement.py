"""Placements: what lies where, whole to parts and back bit for bit, partial sums, and the errors that name names."""

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from tests.distributed import Ranks
from tests.layers.prove import meshes, noise
from tpformer import (
    Axis,
    ColumnParallelLinear,
    Mesh,
    Piece,
    Placement,
    RMSNorm,
    VocabParallelEmbedding,
    full_gradient,
    full_parameter,
    load_full_state,
    placements,
    reduce_partial_gradients,
    trace_communication,
)
from tpformer.placement import gather_full, load_full, mesh_of, replicated, split, sum_partial


def grouped(axis: Axis) -> Placement:
    """As attention's weight with 2 KV heads, at tp 4 shared by two ranks each: its own queries, then the copies."""
    if axis.size <= 2:
        return split((12, 3), 0, axis, 12 // axis.size)
    head, copy = divmod(axis.rank, axis.size // 2)
    return Placement((12, 3), 0, (Piece(6 * head + 2 * copy, 2), Piece(6 * head + 4, 2, 2, copy)), partial=True)


Make = Callable[[Axis], tuple[Placement, tuple[int, ...]]]  # of an axis: placement and local shape
PLACEMENTS: dict[str, Make] = {
    "replicated": lambda axis: (replicated((5, 3), axis), (5, 3)),
    "replicated vector": lambda axis: (replicated((5,), axis), (5,)),
    "scalar": lambda axis: (replicated((), axis), ()),
    "split rows": lambda axis: (split((8, 3), 0, axis, 8 // axis.size), (8 // axis.size, 3)),
    "split columns": lambda axis: (split((3, 8), 1, axis, 8 // axis.size), (3, 8 // axis.size)),
    "split vector": lambda axis: (split((8,), 0, axis, 8 // axis.size), (8 // axis.size,)),
    "101 rows padded to 128": lambda axis: (split((101, 3), 0, axis, 128 // axis.size), (128 // axis.size, 3)),
    "60 rows padded to 128": lambda axis: (split((60, 3), 0, axis, 128 // axis.size), (128 // axis.size, 3)),
    "copies": lambda axis: (grouped(axis), (6 if axis.size == 2 else 12 if axis.size == 1 else 4, 3)),
}
SPECIAL = {"ordinary": [], "infinite": [torch.inf, -torch.inf], "nan": [torch.nan], "negative zero": [-0.0]}


def content(shape: tuple[int, ...], special: str) -> Tensor:
    """A whole fp32 tensor with special values at its ends."""
    whole = noise("whole", *shape).float()
    for i, value in enumerate(SPECIAL[special][: whole.numel()]):
        whole.view(-1)[-1 - i] = value
    return whole


def round_trip(name: str, special: str) -> dict[str, tuple[Any, ...]]:
    answers = {}
    for layout, mesh in meshes().items():
        placement, local_shape = PLACEMENTS[name](mesh.tp)
        local = torch.full(local_shape, 7.0)
        load_full(local, placement, content(placement.shape, special))
        answers[layout] = (mesh.tp.rank, local.numpy(), gather_full(local, placement, mesh.tp).numpy())
    return answers


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("special", SPECIAL)
def test_whole_to_parts_and_back_is_the_identity_bit_for_bit(ranks: Ranks, name: str, special: str) -> None:
    for answers in [round_trip(name, special), *ranks(round_trip, 4, name, special)]:
        for layout, (_, _, whole) in answers.items():
            expected = content(PLACEMENTS[name](Axis("tp"))[0].shape, special).numpy()
            assert whole.shape == expected.shape
            assert whole.tobytes() == expected.tobytes(), layout


@pytest.mark.parametrize(("vocab_size", "real"), [(101, [32, 32, 32, 5]), (60, [32, 28, 0, 0])])
def test_an_uneven_split_leaves_zeros(ranks: Ranks, vocab_size: int, real: list[int]) -> None:
    whole = content((vocab_size, 3), "ordinary")
    for rank, answers in enumerate(ranks(round_trip, 4, f"{vocab_size} rows padded to 128", "ordinary")):
        _, local, _ = answers["tp 4"]
        rows = slice(32 * rank, 32 * rank + real[rank])
        assert (local[: real[rank]] == whole[rows].numpy()).all()
        assert (local[real[rank] :] == 0).all()


def test_each_rank_gets_its_part() -> None:
    whole = content((12, 3), "ordinary")
    rows = {0: [0, 1, 4, 5], 1: [2, 3, 4, 5], 2: [6, 7, 10, 11], 3: [8, 9, 10, 11]}
    for rank, expected in rows.items():
        local = torch.empty(4, 3)
        load_full(local, grouped(Axis("tp", 4, rank)), whole)
        assert torch.equal(local, whole[expected])
        local = torch.empty(3, 3)
        load_full(local, split((3, 12), 1, Axis("tp", 4, rank), 3), whole.T)
        assert torch.equal(local, whole.T[:, 3 * rank : 3 * rank + 3])


def test_the_values_of_the_constructors() -> None:
    axis = Axis("tp", 4, 2)
    assert replicated((5, 3), axis, partial=True) == Placement((5, 3), 0, (Piece(0, 5, 4, 2),), True)
    assert split((101, 3), 0, axis, 32) == Placement((101, 3), 0, (Piece(64, 32),))
    assert split((101, 3), 0, Axis("tp", 4, 3), 32) == Placement((101, 3), 0, (Piece(96, 5),))
    assert split((60, 3), 0, axis, 32) == Placement((60, 3), 0, (Piece(60, 0),))
    assert list(split((60, 3), 0, axis, 32).slices()) == []


def test_loading_another_shape_is_an_error() -> None:
    local = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"shape \(3, 8\) does not match the parameter's \(8, 3\)"):
        load_full(local, split((8, 3), 0, Axis("tp", 4), 2), torch.zeros(3, 8))
    assert torch.equal(local, torch.ones(2, 3))


def gather_different() -> list[str]:
    """What gather_full says on this rank if one rank's copy, or part, is not like the others'."""
    mesh, answers = meshes()["tp 4"], []
    for name in ("replicated", "scalar", "copies", "split rows"):
        placement, shape = PLACEMENTS[name](mesh.tp)
        local = torch.ones(shape) + (mesh.tp.rank == 3)
        try:
            gather_full(local, placement, mesh.tp)
            answers.append("")
        except RuntimeError as error:
            answers.append(str(error))
    return answers


def test_copies_that_differ_are_an_error_on_every_rank(ranks: Ranks) -> None:
    for *copied, parted in ranks(gather_different, 4):
        for answer in copied:
            assert answer.startswith("copies of this tensor differ between tensor-parallel ranks")
        assert parted == ""


Sums = dict[str, tuple[int, dict[str, npt.NDArray[Any]], list[tuple[str, int, str]]]]


def sum_some(dtype: torch.dtype) -> Sums:
    """Every kind of placement at once, partial or not; each rank brings numbers of its own."""
    answers: Sums = {}
    for layout, mesh in meshes().items():
        tp = mesh.tp
        known = {
            "norm": replicated((5,), tp, partial=True),
            "scalar": replicated((), tp, partial=True),
            "not partial": replicated((5,), tp),
            "split": split((8, 3), 0, tp, 8 // tp.size),
            "qkv": grouped(tp),
            "table": replicated((2, 3), tp, partial=True),
        }
        local = {name: noise(f"{name} {tp.rank}", *shape_of(name, tp.size)).to(dtype) for name in known}
        with trace_communication() as trace:
            sum_partial(local, known, tp)
        calls = [(call.op, call.bytes, call.dtype) for call in trace.calls]
        answers[layout] = (tp.rank, {name: t.double().numpy() for name, t in local.items()}, calls)
    return answers


def shape_of(name: str, tp: int) -> tuple[int, ...]:
    qkv = (4 if tp == 4 else 12 // tp, 3)
    return {"scalar": (), "split": (8 // tp, 3), "qkv": qkv, "table": (2, 3)}.get(name, (5,))


def expected_sum(name: str, tp: int, rank: int, dtype: torch.dtype) -> Tensor:
    """The sum over the ranks that hold the copy, added up in fp64."""
    bring = [noise(f"{name} {r}", *shape_of(name, tp)).to(dtype).double() for r in range(tp)]
    if name == "qkv" and tp == 4:  # the last two rows are shared by neighbours
        pair = [r for r in range(4) if r // 2 == rank // 2]
        return torch.cat([bring[rank][:2], torch.stack([bring[r][2:] for r in pair]).sum(0)])
    return torch.stack(bring).sum(0) if name in ("norm", "scalar", "table") else bring[rank]


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)], ids=str
)
def test_partial_copies_are_summed_in_one_all_reduce(ranks: Ranks, dtype: torch.dtype, rtol: float) -> None:
    for answers in [sum_some(dtype), *ranks(sum_some, 4, dtype)]:
        for layout, (rank, local, calls) in answers.items():
            tp = int(layout.split()[1])
            for name, value in local.items():
                expected = expected_sum(name, tp, rank, dtype)
                torch.testing.assert_close(
                    torch.from_numpy(value), expected, rtol=rtol, atol=1e-6 if rtol > 1e-9 else 0
                )
            kind, size = ("float64", 8) if dtype == torch.float64 else ("float32", 4)
            numbers = 5 + 1 + 6 + (2 * 6 if tp == 4 else 0)
            assert calls == ([] if tp == 1 else [("all_reduce", size * numbers, kind)]), layout


def sum_mixed() -> list[float]:
    """The error in a fp64 gradient that is summed beside an fp32 one."""
    tp = meshes()["tp 4"].tp
    local = {"a": torch.ones(1), "b": torch.full((1,), 1 / 3, dtype=torch.float64)}
    sum_partial(local, {name: replicated((1,), tp, partial=True) for name in local}, tp)
    return [abs(local["a"].item() - 4), abs(local["b"].item() - 4 / 3)]


def test_fp64_is_summed_in_fp64_beside_fp32(ranks: Ranks) -> None:
    for errors in ranks(sum_mixed, 4):
        assert max(errors) < 1e-15


class Net(nn.Module):
    """A placed layer, a shared parameter, and one that no layer of tpformer has placed."""

    def __init__(self, mesh: Mesh, foreign: bool = True):
        super().__init__()
        self.embedding = VocabParallelEmbedding(101, 4, mesh=mesh)
        self.up = ColumnParallelLinear(4, 8, mesh=mesh)
        self.norm = RMSNorm(4, mesh=mesh)
        self.head = VocabParallelEmbedding(101, 4, mesh=mesh)
        self.head.weight = self.embedding.weight
        if foreign:
            self.foreign = nn.LayerNorm(4, bias=False)


def test_placements_of_a_model() -> None:
    mesh = Mesh(tp=Axis("tp", 4, 1))
    assert placements(Net(mesh), mesh) == {
        "embedding.weight": split((101, 4), 0, mesh.tp, 32),
        "up.weight": split((8, 4), 0, mesh.tp, 2),
        "up.bias": split((8,), 0, mesh.tp, 2),
        "norm.weight": replicated((4,), mesh.tp),
        "foreign.weight": replicated((4,), mesh.tp),
    }


def test_an_unplaced_parameter_under_sequence_parallelism_is_named() -> None:
    mesh = Mesh(tp=Axis("tp", 4), sequence_parallel=True)
    with pytest.raises(ValueError, match=r"parameter foreign.weight \(LayerNorm\) has no Placement"):
        placements(Net(mesh), mesh)
    assert placements(Net(mesh, foreign=False), mesh)["norm.weight"].partial
    alone = Mesh(sequence_parallel=True)
    assert "foreign.weight" in placements(Net(alone), alone)  # alone nothing is partial


def test_mesh_of() -> None:
    mesh = Mesh(tp=Axis("tp", 4))
    assert mesh_of(nn.Sequential(nn.Linear(2, 2), Net(mesh))) is mesh
    assert mesh_of(nn.Linear(2, 2)) == Mesh()


def test_a_state_that_does_not_fit_is_told_in_full_and_nothing_is_copied() -> None:
    net = Net(Mesh())
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    state = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    state["embedding.weight"] = torch.zeros(101, 4)
    del state["up.bias"], state["norm.weight"]
    state |= {"up.weight": torch.zeros(4, 8), "up.scale": torch.zeros(1), "extra": torch.zeros(1)}
    with pytest.raises(ValueError) as caught:
        load_full_state(net, state)
    message = str(caught.value)
    for problem in ("missing up.bias", "missing norm.weight", "unknown up.scale", "unknown extra"):
        assert problem in message
    assert "up.weight has shape (4, 8), expected (8, 4)" in message
    assert message.count(";") == 4
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def use_a_model() -> dict[str, dict[str, npt.NDArray[Any]]]:
    results = {}
    for layout, mesh in meshes().items():
        net = Net(mesh, foreign=False)
        shapes = {name: p.shape for name, p in placements(net, mesh).items()}
        load_full_state(net, {name: noise(name, *shape) for name, shape in shapes.items()})
        values = {name: full_parameter(net, name).numpy() for name in shapes}
        for name, p in net.named_parameters():  # as if backward had left this rank's part of noise
            p.grad = torch.zeros_like(p)
            load_full(p.grad, placements(net, mesh)[name], noise(f"{name}.grad", *shapes[name]))
        reduce_partial_gradients(net)
        results[layout] = values | {f"{name}.grad": full_gradient(net, name).numpy() for name in shapes}
    return results


def test_full_parameter_and_full_gradient(ranks: Ranks) -> None:
    for results in [use_a_model(), *ranks(use_a_model, 4)]:
        for layout, values in results.items():
            assert len(values) == 8
            for name, value in values.items():
                partial = mesh_size(layout) if name == "norm.weight.grad" and "sequence" in layout else 1
                assert (value == (partial * noise(name, *value.shape).float()).numpy()).all(), f"{name}, {layout}"


def mesh_size(layout: str) -> int:
    return int(layout.split()[1])


def test_no_gradient_yet_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"parameter up\.weight has no gradient; call backward first"):
        full_gradient(Net(Mesh()), "up.weight")
