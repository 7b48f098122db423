"""What only a GPU can show: CUDA graphs, launches on another device and stream, memory, no waiting for the host."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import tpformer_kernels as ops
from tests.kernels.cases import CASES, TRAINED, Case
from tests.kernels.support import Result, evaluate, outputs_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SIZE = (67, 1025)


def run(case: Case, inputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None) -> Result:
    return evaluate(lambda *x: case.ours(*x, backend="triton"), inputs, case.trained, cotangents)


def everything(result: Result) -> tuple[Tensor, ...]:
    return (*result.outputs, *result.gradients)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Whoever waits for the device fails."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_captured_in_a_graph(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    inputs, others = case.inputs(*SIZE, dtype), case.inputs(*SIZE, dtype)
    cotangents = run(case, inputs, None).cotangents
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled and warm
        run(case, inputs, cotangents)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, inputs, cotangents)
    for made in (others, [x.clone() for x in inputs]):
        kept = [x.clone() for x in cotangents]
        for x in everything(captured):
            x.fill_(torch.nan)
        for x, y in zip((*inputs, *cotangents), (*made, *kept), strict=True):  # an output may be a view of an input
            x.copy_(y)
        graph.replay()
        expected = run(case, made, kept)
        for x, y in zip(everything(captured), everything(expected), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", CASES)
def test_nothing_waits_for_the_device(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs(*SIZE, torch.bfloat16)
    cotangents = run(case, inputs, None).cotangents
    with no_synchronisation():
        run(case, inputs, cotangents)


@pytest.mark.parametrize("name", CASES)
def test_on_another_stream(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs(*SIZE, torch.float32)
    expected = run(case, inputs, None)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = run(case, inputs, expected.cotangents)
    stream.synchronize()
    for x, y in zip(everything(result), everything(expected), strict=True):
        assert torch.equal(x, y)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", CASES)
def test_on_the_second_device(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs(*SIZE, torch.float32)
    expected = run(case, inputs, None)
    assert torch.cuda.current_device() == 0
    result = run(case, [x.to("cuda:1") for x in inputs], [x.to("cuda:1") for x in expected.cotangents])
    for x, y in zip(everything(result), everything(expected), strict=True):
        assert x.device == torch.device("cuda:1")
        assert torch.equal(x.to("cuda:0"), y)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("name", TRAINED)
def test_auto_takes_the_kernels(name: str) -> None:
    case = TRAINED[name]
    inputs = case.inputs(*SIZE, torch.bfloat16)
    auto = outputs_of(case.ours(*inputs, backend="auto"))
    for x, y in zip(auto, outputs_of(case.ours(*inputs, backend="triton")), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", TRAINED)
def test_memory_is_that_of_outputs_and_gradients(name: str) -> None:
    case = TRAINED[name]
    inputs = case.inputs(4096, 1024, torch.bfloat16)
    result = run(case, inputs, None)
    size, cotangents = sum(x.numel() * x.element_size() for x in everything(result)), result.cotangents
    del result
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(case, inputs, cotangents)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * size + (16 << 20)


def test_the_gradient_in_place_allocates_nothing_of_its_size() -> None:
    logits = torch.randn(1024, 32768, device="cuda", dtype=torch.bfloat16)
    targets, vector = torch.randint(32768, (1024,), device="cuda"), torch.rand(1024, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stats = ops.cross_entropy_statistics(logits, targets, 32768, True)
    lse, weights = stats[:, 0] + stats[:, 1].log(), (vector, vector, vector)
    ours = ops.cross_entropy_gradient(logits, targets, 32768, lse, weights, inplace=True)
    assert ours.data_ptr() == logits.data_ptr()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20
