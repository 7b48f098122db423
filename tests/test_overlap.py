"""Matmuls beside their communication: the same products, in the same order of tokens, whichever way is taken."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.distributed import Ranks
from tests.layers.prove import TOLERANCE, difference, noise
from tests.ways import WAYS, gather, mesh_for, operators, part, scatter
from tpformer import Axis, Mesh, overlap
from tpformer.collectives import start_gather_sequence, start_scatter_sequence
from tpformer.overlap import chunk_lengths, gather_matmul, matmul_scatter

# b, s, d and the features of each matrix; of s/tp = 10 four chunks are not even
SHAPES: list[tuple[int, int, int, Sequence[int]]] = [(1, 12, 7, (5,)), (3, 16, 10, (3, 9)), (2, 40, 6, (4, 1, 11))]


def strided(x: Tensor, how: str) -> Tensor:
    """The same values lying otherwise in memory."""
    if how == "transposed":
        return x.mT.contiguous().mT
    if how == "interleaved":
        return torch.stack([torch.full_like(x, torch.nan), x], dim=-2).unbind(-2)[1]
    if how == "sequence first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x


def errors(way: str, dtype: str, broken: str = "") -> dict[str, float]:
    """The largest error of each result over all shapes and strides, against one process in fp64."""
    mesh, worst = mesh_for(way), {"whole": 0.0, "products": 0.0, "scattered": 0.0}
    kind = getattr(torch, dtype)
    break_it = patch.object(overlap, BROKEN[broken][0], BROKEN[broken][1]) if broken else nullcontext()
    with operators(way), break_it:
        for (b, s, d, features), how in [(s, h) for s in SHAPES for h in ("", "transposed", "interleaved")]:
            x = noise("x", b, s, d)
            matrices = [noise(f"w{i}", d, f) for i, f in enumerate(features)]
            layout = "sequence first" if how == "interleaved" and b > 1 else how
            whole, products = gather(
                strided(part(x, mesh).to(kind), layout), [strided(m.to(kind), how) for m in matrices], mesh
            )
            y = [noise(f"y{r}", b, s, d) for r in range(mesh.tp.size)]
            v = [noise(f"v{r}", d, features[0]) for r in range(mesh.tp.size)]
            my_y, my_v = (strided(t[mesh.tp.rank].to(kind), h) for t, h in ((y, layout), (v, how)))
            scattered = scatter(my_y, my_v, mesh)
            assert all(t.is_contiguous() and t.dtype == kind for t in (*products, scattered))
            assert whole.is_contiguous() or mesh.tp.size == 1
            summed = torch.stack([a @ c for a, c in zip(y, v, strict=True)]).sum(0)
            found = {
                "whole": 0.0 if torch.equal(whole, x.to(kind)) else float("inf"),  # bit for bit: nothing is computed
                "products": max(difference(p.numpy(), x @ m) for p, m in zip(products, matrices, strict=True)),
                "scattered": difference(scattered.numpy(), part(summed, mesh)),
            }
            worst = {name: max(value, found[name]) for name, value in worst.items()}
    return worst


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_the_products_of_one_process(ranks: Ranks, way: str, world_size: int, dtype: str) -> None:
    for worst in ranks(errors, world_size, way, dtype):
        assert worst["whole"] == 0
        assert max(worst.values()) <= TOLERANCE[dtype], worst


def chunk_after_chunk(
    x: Tensor, matrices: Sequence[Tensor], axis: Axis, lengths: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """The tempting mistake: chunks of all ranks behind one another, rather than a rank's tokens together."""
    whole = torch.cat([start_gather_sequence(chunk, axis).wait() for chunk in x.split(list(lengths), dim=1)], dim=1)
    return whole, [whole @ matrix for matrix in matrices]


def sequence_by_sequence(x: Tensor, matrix: Tensor, axis: Axis, lengths: Sequence[int]) -> Tensor:
    """The same mistake on the way out: a chunk is a piece of the whole sequence."""
    pieces = x.split([n * axis.size for n in lengths], dim=1)
    return torch.cat([start_scatter_sequence(piece @ matrix, axis).wait() for piece in pieces], dim=1)


def batch_beside_tokens(x: Tensor, matrices: Sequence[Tensor], axis: Axis) -> tuple[Tensor, list[Tensor]]:
    """b·s/tp rows gathered as if they were tokens: right for a batch of one only."""
    (b, _, d), name = x.shape, axis.group.group_name  # type: ignore[union-attr]
    whole, products = torch.ops.symm_mem.fused_all_gather_matmul(x.reshape(-1, d).contiguous(), list(matrices), 0, name)
    return whole.view(b, -1, d), [product.view(b, -1, product.shape[-1]) for product in products]


def the_next_part(x: Tensor, matrix: Tensor, axis: Axis) -> Tensor:
    """The sum of the next rank's tokens."""
    rolled = x.roll(-(x.shape[1] // axis.size), dims=1)
    group = axis.group.group_name  # type: ignore[union-attr]
    return torch.ops.symm_mem.fused_matmul_reduce_scatter(rolled, matrix, "sum", 1, group).contiguous()


def only_my_part(x: Tensor, matrix: Tensor, axis: Axis, lengths: Sequence[int]) -> Tensor:
    """No sum at all."""
    return (x.chunk(axis.size, dim=1)[axis.rank] @ matrix).contiguous()


# each with a function to put in the place of the right one, the way that calls it, and the results that it spoils
BROKEN: dict[str, tuple[str, Any, str, set[str]]] = {
    "chunk after chunk": ("_chunked_gather_matmul", chunk_after_chunk, "chunked", {"whole", "products"}),
    "sequence by sequence": ("_chunked_matmul_scatter", sequence_by_sequence, "chunked", {"scattered"}),
    "only my part": ("_chunked_matmul_scatter", only_my_part, "chunked", {"scattered"}),
    "batch beside tokens": ("_fused_gather_matmul", batch_beside_tokens, "symm_mem cuda", {"whole", "products"}),
    "the next part": ("_fused_matmul_scatter", the_next_part, "symm_mem fallback", {"scattered"}),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_mistake_is_seen(ranks: Ranks, broken: str) -> None:
    """Negative controls: the comparison above fails, in the results that the mistake spoils and no others."""
    _, _, way, spoilt = BROKEN[broken]
    for worst in ranks(errors, 4, way, "float64", broken):
        assert {name for name, value in worst.items() if value > 1e-2} == spoilt
        assert max(value for name, value in worst.items() if name not in spoilt) <= TOLERANCE["float64"]


def send_as_it_lies() -> str:
    """A transposed x, given to the operator without laying its tokens together."""
    mesh = mesh_for("symm_mem cuda")
    assert mesh.tp.group is not None
    with operators("symm_mem cuda"):
        try:
            x = strided(noise("x", 1, 4, 6), "transposed")
            torch.ops.symm_mem.fused_all_gather_matmul(x, [torch.ones_like(x[0].mT)], 1, mesh.tp.group.group_name)
        except AssertionError as error:
            return type(error).__name__
    return "not noticed"


def test_a_layout_that_the_operator_cannot_send_is_seen(ranks: Ranks) -> None:
    """Negative control: the code of a GPU asserts it, which the fallback does not."""
    assert ranks(send_as_it_lies, 2) == ["AssertionError"] * 2


def pair(way: str, dtype: str) -> list[float]:
    """y = ((x W1ᵀ)²) W2ᵀ, a column- and a row-parallel layer with a hand-written backward, against autograd."""
    mesh, kind, b, s, d, f = mesh_for(way), getattr(torch, dtype), 3, 16, 6, 20
    x, dy, w1, w2 = noise("x", b, s, d), noise("dy", b, s, d), noise("w1", f, d), noise("w2", d, f)
    inputs = [t.clone().requires_grad_() for t in (x, w1, w2)]
    expected = (inputs[0] @ inputs[1].t()).square() @ inputs[2].t()
    grads = torch.autograd.grad(expected, inputs, dy)
    column = slice(mesh.tp.rank * f // mesh.tp.size, (mesh.tp.rank + 1) * f // mesh.tp.size)
    w1, w2 = w1[column].to(kind), w2[:, column].to(kind)
    with operators(way):
        whole, (h,) = gather(part(x, mesh).to(kind), [w1.t()], mesh)  # (b, s, d), (b, s, f/tp)
        y = scatter(h.square(), w2.t(), mesh)  # (b, s/tp, d)
        whole_dy, (da,) = gather(part(dy, mesh).to(kind), [w2], mesh)  # (b, s, d), (b, s, f/tp)
        dh = 2 * h * da
        dx = scatter(dh, w1, mesh)  # (b, s/tp, d)
    dw2 = whole_dy.flatten(0, 1).t() @ h.square().flatten(0, 1)
    dw1 = dh.flatten(0, 1).t() @ whole.flatten(0, 1)
    pairs = [(y, part(expected, mesh)), (dx, part(grads[0], mesh)), (dw1, grads[1][column]), (dw2, grads[2][:, column])]
    return [difference(mine.numpy(), right) for mine, right in pairs]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_a_pair_of_layers_has_the_gradients_of_one_process(ranks: Ranks, way: str, world_size: int, dtype: str) -> None:
    for found in ranks(pair, world_size, way, dtype):
        assert max(found) <= TOLERANCE[dtype], found


@pytest.mark.parametrize(
    ("batch", "length", "least_rows", "lengths"),
    [
        (1, 512, 128, [128] * 4),
        (1, 511, 128, [171, 170, 170]),
        (1, 255, 128, [255]),
        (2, 255, 128, [85, 85, 85]),
        (1, 4096, 128, [1024] * 4),
        (100, 3, 128, [3]),  # one token is too few and two are more than half
        (200, 3, 128, [1, 1, 1]),
        (1, 10, 1, [3, 3, 2, 2]),
        (0, 10, 128, [10]),
        (1, 0, 1, [0]),
    ],
)
def test_chunks_are_nearly_even_and_not_too_small(batch: int, length: int, least_rows: int, lengths: list[int]) -> None:
    assert chunk_lengths(batch, length, least_rows) == lengths


@pytest.mark.parametrize(
    ("x", "matrix", "message"),
    [
        ((2, 8, 6), (5, 6), r"must be \(b, s, d\) @ \(d, f\), not \(2, 8, 6\) @ \(5, 6\)"),
        ((8, 6), (6, 5), r"not \(8, 6\) @ \(6, 5\)"),
        ((2, 8, 6), (2, 6, 5), r"not \(2, 8, 6\) @ \(2, 6, 5\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(x: tuple[int, ...], matrix: tuple[int, ...], message: str) -> None:
    mesh = Mesh(tp=Axis("tp", 4), sequence_parallel=True)  # refused before any communication
    with pytest.raises(ValueError, match=message):
        gather_matmul(torch.ones(x), [torch.ones(matrix)], mesh)
    with pytest.raises(ValueError, match=message):
        matmul_scatter(torch.ones(x), torch.ones(matrix), mesh)


def test_a_sequence_that_tp_does_not_divide_is_named() -> None:
    mesh = Mesh(tp=Axis("tp", 4), sequence_parallel=True)
    with pytest.raises(ValueError, match=r"sequence length \(10\) must be divisible by tp \(4\)"):
        matmul_scatter(torch.ones(2, 10, 6), torch.ones(6, 5), mesh)
