"""The differentiable collectives, and the two doors of a tensor-parallel region.

    enter_parallel   identity   | all-reduce        or, sequence parallel,  all-gather     | reduce-scatter
    leave_parallel   all-reduce | identity          or, sequence parallel,  reduce-scatter | all-gather
                     forward    | backward                                  forward        | backward

Sources: arXiv 1909.08053, section 3 (its f and g); arXiv 2205.05198, section 4.2 (sequence parallelism).
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpformer.mesh import Axis, Mesh

T = TypeVar("T")
InGraph = Literal["in graph"]
"""A collective that torch.compile traces: one of the functional operators, whose result must be waited for."""


class Pending:
    """A tensor that a collective is still filling; `wait()` returns it when it is whole.

    op, axis: what a rank that waits in vain says that it waited for.
    """

    def __init__(
        self,
        work: dist.Work | InGraph | None,
        buffer: Tensor,
        axis_size: int = 1,
        *,
        op: str = "",
        axis: Axis | None = None,
    ):
        self._work, self._buffer, self._axis_size = work, buffer, axis_size
        self.op, self.axis = op, axis

    def wait(self) -> Tensor:
        """Block until the collective is done (on CUDA: until the current stream has it) and return the tensor."""
        if self._work == "in graph":
            self._buffer = torch.ops._c10d_functional.wait_tensor(self._buffer)
        elif self._work is not None:
            self._work.wait()
        if self._axis_size > 1:  # a gathered sequence: (tp, ..., s/tp, d) -> (..., s, d)
            return self._buffer.movedim(0, -3).flatten(-3, -2)
        return self._buffer


def start_all_reduce(x: Tensor, axis: Axis) -> Pending:
    """Start summing x over the axis, in place (compiled, out of place); x must be contiguous and nobody else's."""
    if axis.size == 1:
        return Pending(None, x)
    if torch.compiler.is_compiling():
        return Pending("in graph", torch.ops._c10d_functional.all_reduce(x, "sum", _group_name(axis)))
    return Pending(dist.all_reduce(x, group=axis.group, async_op=True), x, op="all_reduce", axis=axis)


def all_reduce_(x: Tensor, axis: Axis) -> Tensor:
    """Sum x over the axis, in place; compiled, the sum is what is returned only."""
    if torch.compiler.is_compiling():
        return start_all_reduce(x, axis).wait()
    if axis.size > 1:
        dist.all_reduce(x, group=axis.group)
    return x


def start_gather_sequence(x: Tensor, axis: Axis) -> Pending:
    """Start collecting (..., s/tp, d) from every rank into (..., s, d)."""
    if torch.compiler.is_compiling():
        return Pending("in graph", _all_gather_in_graph(x, axis), axis.size)
    buffer = x.new_empty(axis.size, *x.shape)
    return Pending(_all_gather(buffer, x, axis), buffer, axis.size, op="all_gather", axis=axis)


def start_scatter_sequence(x: Tensor, axis: Axis) -> Pending:
    """Start summing (..., s, d) over the axis, leaving each rank its (..., s/tp, d)."""
    parts = split_sequence(x, axis).contiguous()  # (tp, ..., s/tp, d)
    if torch.compiler.is_compiling():
        scatter = torch.ops._c10d_functional.reduce_scatter_tensor
        return Pending("in graph", scatter(parts.flatten(0, 1), "sum", axis.size, _group_name(axis)))
    mine = torch.empty_like(parts[0])
    # torch 2.13 renamed it
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    work = reduce_scatter(mine.view(-1), parts.view(-1), group=axis.group, async_op=True)
    return Pending(work, mine, op="reduce_scatter", axis=axis)


def start_enter(x: Tensor, mesh: Mesh) -> Pending:
    """Start making x whole: (b, s/tp, d) -> (b, s, d) under sequence parallelism, otherwise x as it is."""
    if mesh.sequence_parallel and mesh.tp.size > 1:
        return start_gather_sequence(x, mesh.tp)
    return Pending(None, x)


def start_enter_gradient(partial: Tensor, mesh: Mesh) -> Pending:
    """Start summing a partial gradient (b, s, d), to (b, s/tp, d) under sequence parallelism; maybe in place."""
    if mesh.sequence_parallel and mesh.tp.size > 1:
        return start_scatter_sequence(partial, mesh.tp)
    return start_all_reduce(partial, mesh.tp)


def split_sequence(x: Tensor, axis: Axis) -> Tensor:
    """View (..., s, d) as one part a rank, (tp, ..., s/tp, d).

    Raises ValueError if the axis does not divide the sequence.
    """
    length = x.shape[-2]
    if length % axis.size:
        raise ValueError(f"sequence length ({length}) must be divisible by {axis.name} ({axis.size})")
    return x.unflatten(-2, (axis.size, length // axis.size)).movedim(-3, 0)


def gather_stack(x: Tensor, axis: Axis) -> Tensor:
    """Every rank's x, stacked in rank order along a new dim 0; not differentiable."""
    return start_gather_stack(x, axis).wait()


def start_gather_stack(x: Tensor, axis: Axis) -> Pending:
    """Start collecting every rank's x, stacked in rank order along a new dim 0."""
    if axis.size == 1:
        return Pending(None, x.unsqueeze(0))
    if torch.compiler.is_compiling():
        return Pending("in graph", _all_gather_in_graph(x, axis))
    stacked = x.new_empty(axis.size, *x.shape)
    return Pending(_all_gather(stacked, x, axis), stacked, op="all_gather", axis=axis)


def _all_gather(out: Tensor, x: Tensor, axis: Axis) -> dist.Work:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed it
    # flat, because backends disagree on how the shapes may stack
    return gather(out.view(-1), x.contiguous().view(-1), group=axis.group, async_op=True)


def _all_gather_in_graph(x: Tensor, axis: Axis) -> Tensor:
    """Not yet filled, (tp, *x.shape)."""
    gather = torch.ops._c10d_functional.all_gather_into_tensor
    return gather(x.contiguous().unsqueeze(0), axis.size, _group_name(axis))


def _group_name(axis: Axis) -> str:
    assert axis.group is not None
    return axis.group.group_name


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        if mesh.sequence_parallel:
            return start_gather_sequence(x, mesh.tp).wait()
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.mesh.sequence_parallel:
            return start_scatter_sequence(grad, ctx.mesh.tp).wait(), None
        # a copy: autograd may still own the gradient it hands over
        return all_reduce_(grad.clone(memory_format=torch.contiguous_format), ctx.mesh.tp), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        if mesh.sequence_parallel:
            return start_scatter_sequence(x, mesh.tp).wait()
        return all_reduce_(x.clone(memory_format=torch.contiguous_format), mesh.tp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.mesh.sequence_parallel:
            return start_gather_sequence(grad, ctx.mesh.tp).wait(), None
        return grad, None


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return gather_stack(x, axis).movedim(0, -2).flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _own_features(grad, ctx.axis).contiguous(), None


class _SplitFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _own_features(x, axis).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather_stack(grad, ctx.axis).movedim(0, -2).flatten(-2), None


def _own_features(x: Tensor, axis: Axis) -> Tensor:
    if x.shape[-1] % axis.size:
        raise ValueError(f"features ({x.shape[-1]}) must be divisible by {axis.name} ({axis.size})")
    return x.chunk(axis.size, dim=-1)[axis.rank]


def enter_parallel(x: Tensor, mesh: Mesh) -> Tensor:
    """Bring a replicated x (b, s, d), or this rank's (b, s/tp, d), whole into a tensor-parallel region."""
    return x if mesh.tp.size == 1 else _Enter.apply(x, mesh)


def leave_parallel(x: Tensor, mesh: Mesh) -> Tensor:
    """Sum the ranks' partial x (b, s, d); under sequence parallelism keep only this rank's (b, s/tp, d)."""
    return x if mesh.tp.size == 1 else _Leave.apply(x, mesh)


def gather_features(x: Tensor, axis: Axis) -> Tensor:
    """Collect (..., d/tp) from every rank into (..., d); backward keeps this rank's part of the gradient."""
    return x if axis.size == 1 else _GatherFeatures.apply(x, axis)


def split_features(x: Tensor, axis: Axis) -> Tensor:
    """Keep this rank's (..., d/tp) of a replicated (..., d); backward gathers the gradient's parts."""
    return x if axis.size == 1 else _SplitFeatures.apply(x, axis)


def raise_together(error: BaseException | None, axis: Axis) -> None:
    """Let every rank of the axis hear of the first rank's error; collective, so that no rank waits for a dead one.

    Raises that error itself on the rank that had it, OSError or ValueError with its text on the others.
    """
    text = "" if error is None else f"{'O' if isinstance(error, OSError) else 'V'}{error}"
    if axis.size > 1:
        assert axis.group is not None
        text = next((t for t in gather_texts(text, axis.group) if t), "")
    if error is not None:
        raise error
    if text:
        raise (OSError if text[0] == "O" else ValueError)(text[1:])


def together(action: Callable[[], T], axis: Axis) -> T:
    """Do it on every rank of the axis; if it fails on any, every rank raises that error (as `raise_together` does)."""
    error: BaseException | None = None
    try:
        result = action()
    except (Exception, SystemExit) as caught:  # the latter of a command line
        error = caught
    raise_together(error, axis)
    return result


def gather_texts(text: str, group: dist.ProcessGroup) -> list[str]:
    """Every rank's text in rank order, each of at most 4096 bytes; collective."""
    mine = torch.zeros(4096, dtype=torch.uint8, device="cpu")  # also where a model is built on the meta device
    encoded = text.encode()[: len(mine)]
    mine[: len(encoded)] = torch.frombuffer(bytearray(encoded or b"\0"), dtype=torch.uint8)[: len(encoded)]
    mine = mine.to("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    texts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(texts, mine, group=group)
    return [bytes(t.tolist()).rstrip(b"\0").decode(errors="replace") for t in texts]
