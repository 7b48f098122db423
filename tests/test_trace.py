"""The trace sees every collective, whoever issued it, with its axis, bytes, phase and caller."""

import _thread
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from tests.distributed import Ranks
from tests.layers.prove import noise
from tpformer import ColumnParallelLinear, Mesh, trace_communication
from tpformer.collectives import all_reduce_, enter_parallel, start_gather_sequence, start_scatter_sequence
from tpformer.trace import Call, Trace


def named(new: str, old: str) -> Callable[..., Any]:
    """torch 2.13 renamed some collectives."""
    return getattr(dist, new, None) or getattr(dist, old)


def sharded(x: Tensor, mesh: Mesh) -> DTensor:
    assert mesh.device_mesh is not None
    return distribute_tensor(x, mesh.device_mesh["tp"], [Shard(0)], src_data_rank=None)


def issue(name: str, mesh: Mesh) -> None:
    """One collective of three fp64 numbers on each of the axis's 4 ranks, through torch's own interface."""
    group, size = mesh.tp.group, 4
    assert group is not None
    x = torch.ones(3, dtype=torch.float64)
    many, long = [torch.ones_like(x) for _ in range(size)], torch.ones(3 * size, dtype=torch.float64)
    first = mesh.tp.rank == 0
    calls = {
        "all_reduce": lambda: dist.all_reduce(x, group=group),
        "all_gather": lambda: dist.all_gather(many, x, group=group),
        "all_gather into a tensor": lambda: named("all_gather_single", "all_gather_into_tensor")(long, x, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter(x, many, group=group),
        "reduce_scatter of a tensor": lambda: named("reduce_scatter_single", "reduce_scatter_tensor")(
            x, long, group=group
        ),
        "broadcast": lambda: dist.broadcast(x, 0, group=group),
        "reduce": lambda: dist.reduce(x, 0, group=group),
        "gather": lambda: dist.gather(x, many if first else None, 0, group=group),
        "scatter": lambda: dist.scatter(x, many if first else None, 0, group=group),
        "all_to_all": lambda: dist.all_to_all_single(long, torch.ones_like(long), group=group),
        "barrier": lambda: dist.barrier(group=group),
        "send and recv": lambda: (dist.send if mesh.tp.rank % 2 else dist.recv)(x, mesh.tp.rank ^ 1, group=group),
        "async all_reduce": lambda: dist.all_reduce(x, group=group, async_op=True).wait(),
        "functional all_reduce": lambda: functional.all_reduce(x, "sum", group).sum(),
        "functional broadcast": lambda: functional.broadcast(x, 0, group).sum(),
        "a DTensor made whole": lambda: sharded(long, mesh).full_tensor(),
        "an operation of DTensors": lambda: sharded(long, mesh).softmax(dim=0),  # which needs it whole
    }
    calls[name]()


WHOLE, PART = 96, 24  # bytes of the gathered side, and of one rank's
EXPECTED = {
    "all_reduce": ("all_reduce", PART, "float64"),
    "all_gather": ("all_gather", WHOLE, "float64"),
    "all_gather into a tensor": ("all_gather", WHOLE, "float64"),
    "reduce_scatter": ("reduce_scatter", WHOLE, "float64"),
    "reduce_scatter of a tensor": ("reduce_scatter", WHOLE, "float64"),
    "broadcast": ("broadcast", PART, "float64"),
    "reduce": ("reduce", PART, "float64"),
    "gather": ("gather", WHOLE, "float64"),
    "scatter": ("scatter", WHOLE, "float64"),
    "all_to_all": ("all_to_all", WHOLE, "float64"),
    "barrier": ("barrier", 0, "-"),
    "send and recv": ("", PART, "float64"),
    "async all_reduce": ("all_reduce", PART, "float64"),
    "functional all_reduce": ("all_reduce", PART, "float64"),
    "functional broadcast": ("broadcast", PART, "float64"),
    "a DTensor made whole": ("all_gather", WHOLE, "float64"),
    "an operation of DTensors": ("all_gather", WHOLE, "float64"),
}


def record(name: str) -> list[Call]:
    mesh = Mesh.create(tp=4)
    with trace_communication() as trace:
        issue(name, mesh)
    return [Call(**vars(call)) for call in trace.calls]


@pytest.mark.parametrize("name", EXPECTED)
def test_whoever_issues_it(ranks: Ranks, name: str) -> None:
    """Not one of these goes through tpformer's own collectives."""
    for rank, calls in enumerate(ranks(record, 4, name)):
        assert len(calls) == 1
        op, size, dtype = EXPECTED[name]
        assert (calls[0].op, calls[0].dtype) == (op or ("send" if rank % 2 else "recv"), dtype)
        assert (calls[0].axis, calls[0].phase) == ("tp", "forward")
        assert calls[0].site.startswith("tests/test_trace.py:")
        if rank == 0 or name not in ("gather", "scatter"):  # there only one rank has the whole side
            assert calls[0].bytes == size


def record_axes() -> list[str]:
    mesh = Mesh.create(tp=2)
    x = torch.ones(3)
    with trace_communication() as trace:
        all_reduce_(x, mesh.tp)
        all_reduce_(x, mesh.dp)
        all_reduce_(x, mesh.world)
        dist.all_reduce(x)
    return [call.axis for call in trace.calls]


def test_axes_have_their_names(ranks: Ranks) -> None:
    assert ranks(record_axes, 4) == [["tp", "dp", "world", "world"]] * 4


def record_own() -> list[Call]:
    """tpformer's own collectives; `site` must be the line here, not the plumbing."""
    mesh = Mesh.create(tp=4)
    x = torch.ones(2, 8, 3)
    with trace_communication() as trace:
        all_reduce_(x, mesh.tp)
        start_gather_sequence(x, mesh.tp).wait()
        start_scatter_sequence(x, mesh.tp).wait()
        y = enter_parallel(x.requires_grad_(), mesh)
        assert len(trace.calls) == 3
        y.sum().backward()
    return trace.calls


def line_of(text: str) -> int:
    """The first line of this file that ends in `text`."""
    with open(__file__, encoding="utf-8") as source:
        return next(number for number, line in enumerate(source, 1) if line.rstrip().endswith(text))


def test_own_collectives_name_their_caller(ranks: Ranks) -> None:
    first = line_of("start_gather_sequence(x, mesh.tp).wait()") - 1
    for calls in ranks(record_own, 4):
        assert [(call.op, call.bytes, call.phase) for call in calls] == [
            ("all_reduce", 192, "forward"),
            ("all_gather", 4 * 192, "forward"),
            ("reduce_scatter", 192, "forward"),
            ("all_reduce", 192, "backward"),
        ]
        assert [int(call.site.rpartition(":")[2]) - first for call in calls] == [0, 1, 2, 5]


def record_backward() -> list[tuple[str, str]]:
    """A forward that runs again inside backward, and a collective in a gradient's hook, are backward."""
    mesh = Mesh.create(tp=4)
    layer = ColumnParallelLinear(4, 8, mesh=mesh)
    x = torch.ones(2, 8, 4, requires_grad=True)
    with trace_communication() as trace:
        all_reduce_(torch.ones(1), mesh.tp)

        def inner(x: Tensor) -> Tensor:
            dist.broadcast(torch.ones(1), 0, group=mesh.tp.group)
            return layer(x)

        y = checkpoint(inner, x, use_reentrant=False)
        y.register_hook(lambda grad: dist.barrier(group=mesh.tp.group))
        y.sum().backward()
        all_reduce_(torch.ones(1), mesh.tp)
    return [(call.op, call.phase) for call in trace.calls]


def test_what_runs_inside_backward_is_backward(ranks: Ranks) -> None:
    forward = [("all_reduce", "forward"), ("broadcast", "forward")]
    backward = [("barrier", "backward"), ("broadcast", "backward"), ("all_reduce", "backward")]
    for calls in ranks(record_backward, 4):
        assert calls == [*forward, *backward, ("all_reduce", "forward")]


def record_nested() -> tuple[int, int, int]:
    mesh = Mesh.create(tp=2)
    with trace_communication() as outer:
        all_reduce_(torch.ones(1), mesh.tp)
        with trace_communication() as inner:
            all_reduce_(torch.ones(1), mesh.tp)
    all_reduce_(torch.ones(1), mesh.tp)  # nobody listens any more
    return len(outer.calls), len(inner.calls), outer.count(op="all_reduce", axis="tp", phase="forward")


def test_traces_nest_and_end(ranks: Ranks) -> None:
    assert ranks(record_nested, 2) == [(2, 1, 2)] * 2


def record_at_the_bottom_of_the_stack() -> list[str]:
    """As in the main module of a script: the caller is the outermost frame."""
    mesh, done = Mesh.create(tp=2), threading.Event()
    sites: list[str] = []

    def body() -> None:
        with trace_communication() as trace:
            dist.all_reduce(torch.ones(1), group=mesh.tp.group)
        sites.extend(call.site for call in trace.calls)
        done.set()

    _thread.start_new_thread(body, ())
    assert done.wait(20)
    return sites


def test_the_outermost_caller_is_named_too(ranks: Ranks) -> None:
    for sites in ranks(record_at_the_bottom_of_the_stack, 2):
        assert sites == [f"tests/test_trace.py:{line_of('dist.all_reduce(torch.ones(1), group=mesh.tp.group)')}"]


def some_trace() -> Trace:
    trace = Trace()
    trace.calls = [
        Call("all_reduce", "tp", 1000, "float32", "forward", "layers/mlp.py:1"),
        Call("all_gather", "tp", 24, "bfloat16", "backward", "layers/linear.py:22"),
        Call("all_reduce", "tp", 2500, "float32", "forward", "layers/mlp.py:1"),
        Call("all_reduce", "dp", 8, "float32", "backward", "parallel/data.py:3"),
    ]
    return trace


def test_the_table() -> None:
    assert some_trace().table().split("\n") == [
        "op          axis  phase     dtype     calls  bytes  issued by",
        "all_reduce  tp    forward   float32       2  3,500  layers/mlp.py:1",
        "all_gather  tp    backward  bfloat16      1     24  layers/linear.py:22",
        "all_reduce  dp    backward  float32       1      8  parallel/data.py:3",
        "total                                     4  3,532",
    ]
    assert Trace().table().split("\n")[-1].split() == ["total", "0", "0"]


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 4),
        ({"op": "all_reduce"}, 3),
        ({"op": "all_reduce", "axis": "tp"}, 2),
        ({"phase": "backward"}, 2),
        ({"axis": "pp"}, 0),
    ],
)
def test_count(fields: dict[str, Any], count: int) -> None:
    assert some_trace().count(**fields) == count


def issue_unknown() -> str:
    mesh = Mesh.create(tp=2)
    assert mesh.tp.group is not None
    x = torch.ones(3)
    dist.barrier()  # a rank that left at once would break the connections that its peers still make
    try:
        with trace_communication():
            torch.ops.c10d.allgather_coalesced_.default([[x, x.clone()]], [x], mesh.tp.group.boxed())
    except RuntimeError as error:
        return str(error)
    return "not noticed"


def test_an_unknown_collective_is_an_error_rather_than_missing(ranks: Ranks) -> None:
    for answer in ranks(issue_unknown, 2):
        assert answer == "the trace does not know the collective c10d::allgather_coalesced_"


def test_what_does_not_communicate_is_not_recorded() -> None:
    with trace_communication() as trace:
        x = noise("x", 3, 3).requires_grad_()
        (x @ x).softmax(-1).square().sum().backward()
    assert trace.calls == []
