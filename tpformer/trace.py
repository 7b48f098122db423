"""The ledger of communication: every collective of this process, whoever issued it.

It listens below `torch.distributed`, at the c10d operators, so nothing that communicates can escape it.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# c10d operator -> the field's name for it, and which argument is the larger side: the payload
_OPERATORS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 1),
    "alltoall_": ("all_to_all", 0),
    "alltoall_base_": ("all_to_all", 0),
    "send": ("send", 0),
    "recv_": ("recv", 0),
    "recv_any_source_": ("recv", 0),
    "barrier": ("barrier", 0),
}


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

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._record(func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _record(self, operator: str, args: Any) -> None:
        if operator not in _OPERATORS:
            raise RuntimeError(f"the trace does not know the collective c10d::{operator}")
        op, payload = _OPERATORS[operator]
        tensors = [] if op == "barrier" else list(_tensors(args[payload]))
        in_backward = torch._C._current_graph_task_id() != -1
        self.calls.append(
            Call(
                op=op,
                axis=_axis_name(args),
                bytes=sum(t.numel() * t.element_size() for t in tensors),
                dtype=str(tensors[0].dtype).removeprefix("torch.") if tensors else "-",
                phase="backward" if in_backward else "forward",
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
    if isinstance(argument, torch.Tensor):
        yield argument
    else:
        for item in argument:
            yield from _tensors(item)


def _axis_name(args: Any) -> str:
    """The name of the mesh axis whose process group is among a c10d operator's arguments."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            group = dist.ProcessGroup.unbox(argument)
            # a DeviceMesh describes the group of its axis "tp" as "mesh_tp"
            return group.group_desc.removeprefix("mesh_").replace("default_pg", "world")
    return "?"


def _call_site() -> str:
    """file:line of the nearest caller outside torch and this library's plumbing."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = frame.f_code.co_filename.replace("\\", "/")
        plumbing = path.endswith(("tpformer/trace.py", "tpformer/collectives.py"))
        if not plumbing and "/torch/" not in path and "<" not in path:
            return f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
