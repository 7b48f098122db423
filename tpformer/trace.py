"""The ledger of communication: every collective of this process, whoever issued it.

It listens below `torch.distributed`, at its operators (the functional ones and DTensor's too), so nothing that
communicates can escape it.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# operator of torch.distributed's two families, less a trailing underscore -> the field's name for it
_OPERATORS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "_allgather_base": "all_gather",
    "allgather": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "send": "send",
    "recv": "recv",
    "recv_any_source": "recv",
    "barrier": "barrier",
    "fused_all_gather_matmul": "fused_all_gather_matmul",  # symmetric memory's, which no other operator is below
    "fused_matmul_reduce_scatter": "fused_matmul_reduce_scatter",
}
_NOT_COLLECTIVE = ("wait_tensor", "_wrap_tensor_autograd")
_PLUMBING = ("tpformer/trace.py", "tpformer/collectives.py", "tpformer/overlap.py", "train/lost_ranks.py")
_FOREIGN = re.compile(
    r"/(site|dist)-packages/(?!tpformer/)|/lib/python3[^/]*/(?!(site|dist)-packages/)|/torch/|/torchinductor|<"
)
"""Paths of torch, Python and other packages; this one may be installed beside them."""


@dataclass(frozen=True)
class Call:
    """One collective: its axis, its payload in bytes (the unsharded side) and where it was issued."""

    op: str
    axis: str
    bytes: int
    dtype: str
    phase: str  # "forward" or "backward"
    site: str  # file:line of the caller


class Trace(TorchDispatchMode):
    """The collectives issued while it is active; `calls` in order, `table()` grouped."""

    supports_higher_order_operators = True  # compiled recomputation keeps the state of random numbers by them

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run as such: torch would run it eagerly. Its collectives still come by here."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # DTensor goes first, and issues the collectives that it needs
        if isinstance(func, torch._ops.HigherOrderOperator):
            return func(*args, **(kwargs or {}))
        operator = func._schema.name.split("::")[1]
        if func.namespace in ("c10d", "_c10d_functional", "symm_mem") and operator not in _NOT_COLLECTIVE:
            self._record(f"{func.namespace}::{operator}", args)
        return func(*args, **(kwargs or {}))

    def _record(self, operator: str, args: Any) -> None:
        op = _OPERATORS.get(operator.split("::")[1].removesuffix("_"))
        if op is None:
            raise RuntimeError(f"the trace does not know the collective {operator}")
        size, dtype = _payload(op, args)
        self.calls.append(
            Call(
                op=op,
                axis=_axis_name(args),
                bytes=size,
                dtype=dtype,
                phase="backward" if torch._C._current_graph_task_id() != -1 else "forward",
                site=_call_site(),
            )
        )

    def count(self, **fields: str) -> int:
        """How many calls have all these fields, e.g. `count(op="all_reduce", axis="tp", phase="forward")`."""
        return sum(all(getattr(call, name) == value for name, value in fields.items()) for call in self.calls)

    def table(self) -> str:
        """The calls grouped by op, axis, phase, dtype and caller, in order of first appearance."""
        groups: Counter[tuple[str, ...]] = Counter()
        payload: Counter[tuple[str, ...]] = Counter()
        for call in self.calls:
            group = (call.op, call.axis, call.phase, call.dtype, call.site)
            groups[group] += 1
            payload[group] += call.bytes
        rows: list[tuple[str, ...]] = [("op", "axis", "phase", "dtype", "calls", "bytes", "issued by")]
        rows += [(*g[:4], str(groups[g]), f"{payload[g]:,}", g[4]) for g in groups]
        rows.append(("total", "", "", "", str(len(self.calls)), f"{sum(payload.values()):,}", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(7)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column in (4, 5) else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


@contextmanager
def trace_communication() -> Iterator[Trace]:
    """Record every collective of this process: `with trace_communication() as trace: ...`."""
    with Trace() as trace:
        yield trace


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    """The tensors in an argument: itself, in a list, in lists of lists."""
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from _tensors(item)


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _payload(op: str, args: Any) -> tuple[int, str]:
    """Bytes and dtype of a collective's unsharded side, of its operator's arguments."""
    if op.startswith("fused"):  # a tensor, one matrix or several, a dim, ..., a group
        x, dtype = args[0], str(args[0].dtype).removeprefix("torch.")
        if op == "fused_all_gather_matmul":
            return _group(args[-1]).size() * _bytes([x]), dtype
        return _bytes([x]) // x.shape[-1] * args[1].shape[-1], dtype  # of the product
    # in and out come first; the larger is the payload, but functional all-gathers show only what goes in
    sides = [] if op == "barrier" else [list(_tensors(side)) for side in args[:2]]
    tensors = max(sides, key=_bytes, default=[])
    times = args[1] if op == "all_gather" and isinstance(args[1], int) else 1
    return times * _bytes(tensors), str(tensors[0].dtype).removeprefix("torch.") if tensors else "-"


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _axis_name(args: Any) -> str:
    """The name of the mesh axis whose process group, or the name of it, is among an operator's arguments."""
    for argument in args:
        group = None
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            group = dist.ProcessGroup.unbox(argument)
        elif argument is args[-1] and isinstance(argument, str):  # the functional family
            group = _group(argument)
        if group is not None:
            return axis_name(group)
    return "?"


def axis_name(group: dist.ProcessGroup) -> str:
    """The mesh axis of a process group, which a DeviceMesh describes as "mesh_tp"."""
    return group.group_desc.removeprefix("mesh_").replace("default_pg", "world")


def _call_site() -> str:
    """file:line of the nearest caller outside torch, other packages and this library's plumbing."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if site := site_of(frame, frame.f_lineno):
            return site
        frame = frame.f_back
    return "?"


def site_of(frame: FrameType, line: int) -> str:
    """file:line of a frame; "" for one of torch, Python, other packages and this library's plumbing."""
    path = frame.f_code.co_filename.replace("\\", "/")
    return "" if path.endswith(_PLUMBING) or _FOREIGN.search(path) else f"{'/'.join(path.split('/')[-2:])}:{line}"
