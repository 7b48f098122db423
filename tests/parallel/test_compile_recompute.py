"""Compiled blocks that recompute a module inside: one program for all of them, and the numbers of eager ones."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from tests.proofs.cases import llama, measure_model, mismatches
from tpformer import Llama, Mesh, ParallelConfig, trace_communication
from tpformer.parallel.compile import compile_blocks
from tpformer.parallel.recompute import apply_recompute

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def test_more_blocks_than_dynamo_has_patience_for() -> None:
    """Ten, of which each recomputes its attention's core: one program, under a trace too."""
    eager = Llama(llama(num_layers=10), Mesh()).double()
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(compiled, backend="aot_eager")
    apply_recompute(compiled, ParallelConfig(recompute="selective"))
    expected = measure_model(eager)
    with trace_communication() as trace:
        found = measure_model(compiled)
    assert mismatches(expected, found, 1e-10) == []
    assert counters["stats"]["unique_graphs"] == 1
    assert trace.calls == []
    torch._dynamo.reset()
