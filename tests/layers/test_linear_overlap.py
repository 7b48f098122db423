"""The linear layers with matmuls beside their communication: torch.nn.Linear's numbers still, and really overlapped."""

from collections import Counter
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.distributed import Ranks
from tests.layers.prove import TOLERANCE, Results, difference, evaluate, take
from tests.layers.test_linear import CASES, forward_of, reference
from tests.ways import WAYS, mesh_for, operators
from tpformer import trace_communication
from tpformer.layers import linear
from tpformer.overlap import gather_matmul, matmul_scatter

GATHER_AND_SCATTER = "all_gather", "reduce_scatter"
OVERLAPPED = [way for way in WAYS if way != "plain"]


SMALL: dict[str, Any] = {f.__name__: partial(f, least_rows=2) for f in (gather_matmul, matmul_scatter)}


def run(way: str, name: str) -> Results:
    """On a rank: the results in each dtype."""
    case, mesh = CASES[name], mesh_for(way)
    results: Results = {}
    with operators(way), patch.multiple(linear, **SMALL):
        for dtype in (torch.float64, torch.float32):
            layer = case.build(mesh, dtype)
            x, dy = (t.to(dtype) for t in case.tensors())
            found = evaluate(layer, x, dy, mesh, forward=forward_of(layer, case), kinds=case.parts)
            results[str(dtype).removeprefix("torch.")] = {key: value.numpy() for key, value in found.items()}
    return results


def counted(way: str, name: str) -> Counter[str]:
    """On a rank: how often each collective runs."""
    case, mesh = CASES[name], mesh_for(way)
    x, dy = (take(t.float(), kind, mesh) for t, kind in zip(case.tensors(), case.parts, strict=True))
    with operators(way), patch.multiple(linear, **SMALL):
        layer = case.build(mesh, torch.float32)
        with trace_communication() as trace:
            layer(x.requires_grad_()).backward(dy)
    return Counter(f"{call.phase} {call.op}" for call in trace.calls)


@pytest.mark.parametrize("name", [name for name in CASES if "packed" not in name and "without" not in name])
@pytest.mark.parametrize("way", OVERLAPPED)
def test_is_torch_nn_linear(ranks: Ranks, way: str, name: str) -> None:
    expected = reference(CASES[name])
    for results in ranks(run, 2, way, name):
        for dtype, found in results.items():
            assert found.keys() == expected.keys()
            for key, value in found.items():
                assert difference(value, expected[key]) <= TOLERANCE[dtype], key


@pytest.mark.parametrize("way", OVERLAPPED)
def test_four_ranks(ranks: Ranks, way: str) -> None:
    for name in ("column", "row"):
        expected = reference(CASES[name])
        for results in ranks(run, 4, way, name):
            for dtype, found in results.items():
                assert all(difference(value, expected[key]) <= TOLERANCE[dtype] for key, value in found.items())


@pytest.mark.parametrize("way", WAYS)
def test_the_layers_take_the_way_that_the_mesh_says(ranks: Ranks, way: str) -> None:
    """A column gathers before its matmul and scatters dx, a row the other way round; x for dW comes in one piece."""
    fused = way.startswith("symm_mem")
    gather, scatter = ("fused_all_gather_matmul", "fused_matmul_reduce_scatter") if fused else GATHER_AND_SCATTER
    times = 4 if way == "chunked" else 1
    for column, row in zip(ranks(counted, 2, way, "column"), ranks(counted, 2, way, "row"), strict=True):
        expected = Counter({f"forward {gather}": times, f"backward {scatter}": times})
        assert column == expected + Counter({"backward all_gather": 1})
        assert row == Counter({f"forward {scatter}": times, f"backward {gather}": times})
