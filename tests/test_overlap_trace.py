"""What each way communicates: how often, how much, and when nothing."""

import pytest
import torch

from tests.distributed import Ranks
from tests.layers.prove import noise
from tests.ways import GATHER, SCATTER, WAYS, gather, mesh_for, operators, part, scatter
from tpformer import Mesh, overlap, trace_communication
from tpformer.mesh import Overlap
from tpformer.overlap import gather_matmul, matmul_scatter
from tpformer.trace import Call

B, S, D, F = 2, 40, 6, 5


def record(way: str) -> list[Call]:
    """One of each in forward, one of each inside backward."""
    mesh, x = mesh_for(way), torch.ones(B, S, D)
    mine, matrix = part(x, mesh), torch.ones(D, F)

    def both() -> None:
        gather(mine, [matrix, matrix], mesh)
        scatter(x, matrix, mesh)

    leaf = torch.ones(1, requires_grad=True)
    with operators(way):
        overlap.overlap_mode(mesh)  # decided, so that the trace has the operations alone
        with trace_communication() as trace:
            both()
            leaf.register_hook(lambda grad: both())
            (leaf * 1).backward()
    return trace.calls


CHUNKS = [3, 3, 2, 2]  # of 10 tokens
GATHERED, SCATTERED = 4 * B * S * D, 4 * B * S * F
TRACED = {
    "plain": [("all_gather", GATHERED), ("reduce_scatter", SCATTERED)],
    "chunked": [
        *[("all_gather", GATHERED * n // 10) for n in CHUNKS],
        *[("reduce_scatter", SCATTERED * n // 10) for n in CHUNKS],
    ],
    "symm_mem fallback": [(GATHER, GATHERED), (SCATTER, SCATTERED)],
    "symm_mem cuda": [(GATHER, GATHERED), (SCATTER, SCATTERED)],
}


@pytest.mark.parametrize("way", WAYS)
def test_the_trace_shows_every_way(ranks: Ranks, way: str) -> None:
    for calls in ranks(record, 4, way):
        found = [(call.phase, call.op, call.bytes) for call in calls]
        assert found == [(phase, *call) for phase in ("forward", "backward") for call in TRACED[way]]
        assert sum(call.bytes for call in calls) == 2 * (GATHERED + SCATTERED)
        assert {(call.axis, call.dtype) for call in calls} == {("tp", "float32")}
        assert all(call.site.startswith("tests/ways.py:") for call in calls)


def ops_below_the_limit() -> list[str]:
    """With the default least_rows this is too small for chunks."""
    mesh, x = mesh_for("chunked"), torch.ones(B, S, D)
    overlap.overlap_mode(mesh)
    with trace_communication() as trace:
        gather_matmul(part(x, mesh), [torch.ones(D, F)], mesh)
        matmul_scatter(x, torch.ones(D, F), mesh)
    return [call.op for call in trace.calls]


def test_what_is_small_is_not_chunked(ranks: Ranks) -> None:
    assert ranks(ops_below_the_limit, 2) == [["all_gather", "reduce_scatter"]] * 2


@pytest.mark.parametrize("way", WAYS.values())
def test_alone_nothing_is_communicated(way: Overlap) -> None:
    mesh = Mesh(sequence_parallel=True, overlap=way)
    x, w = noise("x", B, S, D), noise("w", D, F).requires_grad_()
    with trace_communication() as trace:
        whole, (product,) = gather_matmul(x, [w], mesh, least_rows=1)
        summed = matmul_scatter(x, w, mesh, least_rows=1)
    assert trace.calls == []
    assert whole is x
    assert torch.equal(product, x @ w)
    assert torch.equal(summed, x @ w)
    assert not product.requires_grad  # nobody may believe that it is differentiable
    assert not summed.requires_grad
