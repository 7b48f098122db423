"""What linear and cross entropy in chunks cost: matmuls, collectives and their order, and memory."""

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed import Ranks
from tests.layers.losses import B, Case, D, S, V, many_tokens
from tests.layers.prove import meshes, take
from tpformer import Axis, Mesh, trace_communication, vocab_parallel_cross_entropy
from tpformer.collectives import Pending, start_gather_stack
from tpformer.layers import linear_cross_entropy
from tpformer.layers.linear_cross_entropy import vocab_parallel_linear_cross_entropy

TOKENS = 3  # a chunk
CHUNKS = -(-B * S // TOKENS)


MATMULS = ("mm", "addmm", "bmm", "baddbmm", "mv", "linear", "matmul", "accumulate_")


class Matmuls(TorchDispatchMode):
    """How many matmuls run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in MATMULS
        return func(*args, **(kwargs or {}))


def parts(mesh: Mesh, trained: str = "x weight") -> tuple[Tensor, Tensor, Tensor]:
    """This rank's fp32 x and weight, those that are named trained, and the targets."""
    x, weight, targets = Case({}).tensors()
    x, weight = take(x, "tokens", mesh).float(), weight.chunk(mesh.tp.size)[mesh.tp.rank].float()
    return x.detach().requires_grad_("x" in trained), weight.detach().requires_grad_("weight" in trained), targets


def chunk_of(tokens: int, mesh: Mesh) -> int:
    """Bytes of the fp32 logits of so many tokens on a rank."""
    return tokens * V // mesh.tp.size * 4


@pytest.mark.parametrize(
    ("trained", "reduction", "forward", "backward"),
    [
        ("x weight", "mean", 3, 0),
        ("x weight", "sum", 3, 0),
        ("x", "mean", 2, 0),
        ("weight", "mean", 2, 0),
        ("", "mean", 1, 0),
        # the logits twice, as no gradient is known in forward
        ("x weight", "none", 1, 3),
        ("x", "none", 1, 2),
        ("weight", "none", 1, 2),
    ],
)
def test_matmuls_of_a_chunk_are_those_that_the_gradients_need(
    trained: str, reduction: Any, forward: int, backward: int
) -> None:
    x, weight, targets = parts(Mesh(), trained)
    bytes_ = chunk_of(TOKENS, Mesh())
    with Matmuls() as matmuls:
        loss = vocab_parallel_linear_cross_entropy(x, weight, targets, chunk_bytes=bytes_, reduction=reduction)
        assert matmuls.count == forward * CHUNKS
        if trained:
            loss.sum().backward()
    assert matmuls.count == (forward + backward) * CHUNKS


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_gradients_a_chunk_is_one_matmul(reduction: Any) -> None:
    x, weight, targets = parts(Mesh())
    with Matmuls() as matmuls, torch.no_grad():
        loss = vocab_parallel_linear_cross_entropy(
            x, weight, targets, chunk_bytes=chunk_of(TOKENS, Mesh()), reduction=reduction
        )
    assert matmuls.count == CHUNKS
    assert not loss.requires_grad


@pytest.mark.parametrize(
    ("least", "tokens"), [(1, D), (chunk_of(7, Mesh()), 7), (chunk_of(99, Mesh()), B * S)], ids=str
)
def test_by_default_a_chunk_is_as_large_as_the_weight_and_no_smaller_than_the_least(
    least: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_cross_entropy, "LEAST_CHUNK", least)
    with Matmuls() as matmuls, torch.no_grad():
        vocab_parallel_linear_cross_entropy(*parts(Mesh()))
    assert matmuls.count == -(-B * S // tokens)


def run_calls(smoothing: float, trained: str, reduction: Any) -> dict[str, list[tuple[Any, ...]]]:
    """Op, phase, dtype and bytes of each collective of a loss and its backward, in each layout."""
    found = {}
    for layout, mesh in meshes().items():
        x, weight, targets = parts(mesh, trained)
        chunk_bytes = chunk_of(TOKENS, mesh)
        with trace_communication() as trace:
            loss = vocab_parallel_linear_cross_entropy(
                *(x, weight, targets, mesh), chunk_bytes=chunk_bytes, label_smoothing=smoothing, reduction=reduction
            )
            loss.sum().backward()
        found[layout] = [(call.op, call.phase, call.dtype, call.bytes) for call in trace.calls]
    return found


@pytest.mark.parametrize(
    ("smoothing", "trained", "reduction"),
    [(0.0, "x weight", "mean"), (0.1, "x weight", "sum"), (0.0, "weight", "mean"), (0.1, "x weight", "none")],
)
def test_one_gather_a_chunk_forward_and_one_sum_of_dx_backward(
    ranks: Ranks, smoothing: float, trained: str, reduction: str
) -> None:
    """Three numbers a token, four with smoothing; under sequence parallelism x is gathered, and never a second time."""
    sizes = [TOKENS] * (CHUNKS - 1) + [B * S - TOKENS * (CHUNKS - 1)]
    whole = B * S * D * 4
    for found in ranks(run_calls, 4, smoothing, trained, reduction):
        for layout, calls in found.items():
            tp, sequence_parallel = int(layout.split()[1]), "sequence" in layout
            numbers = tp * (4 if smoothing else 3)
            gathers = [("all_gather", "forward", "float32", numbers * tokens * 4) for tokens in sizes]
            enter = [("all_gather", "forward", "float32", whole)] * sequence_parallel
            again = [("all_gather", "backward", "float32", whole)] * (sequence_parallel and reduction == "none")
            leave = ("reduce_scatter" if sequence_parallel else "all_reduce", "backward", "float32", whole)
            assert calls == enter + gathers + again + [leave] * ("x" in trained), layout
    assert not any(run_calls(smoothing, trained, reduction).values())


def run_order(lag: bool) -> list[str]:
    """The order of a training step's matmuls of logits, and of its gathers' starts and waits, at tp 2."""
    events: list[str] = []
    numbers = iter(range(CHUNKS))
    mm = torch.mm

    class Spy(Pending):
        def __init__(self, pending: Pending, number: int):
            self.pending, self.number = pending, number

        def wait(self) -> Tensor:
            events.append(f"wait {self.number}")
            return self.pending.wait()

    def start(x: Tensor, axis: Axis) -> Pending:
        number = next(numbers)
        events.append(f"start {number}")
        pending = Spy(start_gather_stack(x, axis), number)
        return pending if lag else Pending(None, pending.wait())

    def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        if out.shape[1] == V // 2:
            events.append(f"logits {sum(event.startswith('logits') for event in events)}")
        return mm(a, b, out=out)

    mesh = meshes()["tp 2"]
    x, weight, targets = parts(mesh)
    with patch.object(linear_cross_entropy, "start_gather_stack", start), patch.object(torch, "mm", multiply):
        vocab_parallel_linear_cross_entropy(
            x, weight, targets, mesh, chunk_bytes=chunk_of(TOKENS, mesh), reduction="mean"
        ).backward()
    return events


def overlaps(events: list[str]) -> bool:
    """Whether each gather travels during the next chunk's matmul, and no two chunks later is one still under way."""
    at = {event: i for i, event in enumerate(events)}
    beside = all(at[f"start {i}"] < at[f"logits {i + 1}"] < at[f"wait {i}"] for i in range(CHUNKS - 1))
    return beside and all(at[f"wait {i}"] < at[f"logits {i + 2}"] for i in range(CHUNKS - 2))


def test_statistics_travel_while_the_next_logits_are_computed(ranks: Ranks) -> None:
    for events in ranks(run_order, 4, True):
        assert len(events) == len(set(events)) == 3 * CHUNKS
        assert overlaps(events)


def test_a_gather_that_is_waited_for_at_once_is_noticed(ranks: Ranks) -> None:
    """Negative control."""
    for events in ranks(run_order, 4, False):
        assert len(events) == len(set(events)) == 3 * CHUNKS
        assert not overlaps(events)


class Memory(TorchDispatchMode):
    """The most bytes alive at once after any operator, beside the given tensors."""

    def __init__(self, given: list[Tensor]):
        super().__init__()
        self.given = {x.untyped_storage()._cdata for x in given}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self.given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {name: found for name, found in self.alive.items() if not found[0].expired()}
        self.peak = max(self.peak, sum(bytes_ for _, bytes_ in self.alive.values()))
        return out


WORKSPACE = (2 << 20) + (128 << 10)  # twice the rows that the reference works on at a time on a CPU, and vectors (n)
FEW = 64 << 10


@dataclass(frozen=True)
class Sizes:
    """Tokens, width and vocabulary of a loss, and the bytes of a chunk of its logits."""

    tokens: int = 2048
    width: int = 32
    vocabulary: int = 4096
    dtype: torch.dtype = torch.float32
    chunk: int = 4 << 20

    @property
    def weight(self) -> int:
        """Bytes of the weight."""
        return self.vocabulary * self.width * self.dtype.itemsize

    @property
    def x(self) -> int:
        """Bytes of x."""
        return self.tokens * self.width * self.dtype.itemsize

    def peaks(self, mesh: Mesh = Mesh(), reduction: Any = "mean", whole_logits: bool = False) -> tuple[int, int]:
        """The most bytes alive in forward and in backward, on a rank with its share of the vocabulary."""
        x, weight, targets = many_tokens(self.tokens, self.width, self.vocabulary, self.dtype)
        weight = weight.detach().chunk(mesh.tp.size)[mesh.tp.rank].clone().requires_grad_()
        with Memory([x, weight, targets]) as memory:
            if whole_logits:
                loss = vocab_parallel_cross_entropy(F.linear(x, weight), targets, inplace=True)
            else:
                loss = vocab_parallel_linear_cross_entropy(
                    *(x, weight, targets, mesh), chunk_bytes=self.chunk, reduction=reduction
                ).sum()
            forward, memory.peak = memory.peak, 0
            loss.backward()
        return forward, memory.peak


SMALL, LARGE = Sizes(), Sizes(tokens=256, width=512, chunk=FEW)  # weight: an eighth of a chunk, and 128 chunks


@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small weight", "large weight"])
def test_memory_is_one_chunk_of_logits_beside_the_gradients(sizes: Sizes) -> None:
    forward, backward = sizes.peaks()
    assert sizes.chunk + sizes.weight + sizes.x <= forward <= sizes.chunk + sizes.weight + sizes.x + WORKSPACE
    assert sizes.weight + sizes.x <= backward <= sizes.weight + sizes.x + FEW  # forward's own, scaled in place


@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small weight", "large weight"])
def test_memory_without_a_reduction_is_the_same_in_backward(sizes: Sizes) -> None:
    forward, backward = sizes.peaks(reduction="none")
    assert sizes.chunk <= forward <= sizes.chunk + WORKSPACE
    assert sizes.chunk + sizes.weight + sizes.x <= backward <= sizes.chunk + sizes.weight + sizes.x + WORKSPACE


def test_whole_logits_take_more_memory() -> None:
    """Negative control, even where the gradient is written over the logits."""
    bound = SMALL.chunk + SMALL.weight + SMALL.x + WORKSPACE
    assert min(SMALL.peaks(whole_logits=True)) >= SMALL.tokens * SMALL.vocabulary * 4 > 4 * bound


def test_memory_of_low_precision() -> None:
    """The weight's gradient is fp32 in forward; in backward its rounding adds one in the weight's dtype.

    A CPU cannot add bf16 products in fp32: one chunk's gradient, and its x, are copied to fp32 as well.
    """
    sizes = replace(LARGE, dtype=torch.bfloat16)
    forward, backward = sizes.peaks()
    gradients = 2 * sizes.weight + sizes.x
    assert sizes.chunk + gradients <= forward <= (1 + 2) * sizes.chunk + gradients + WORKSPACE
    assert gradients + sizes.weight <= backward <= gradients + sizes.weight + FEW


def run_peaks() -> tuple[int, int]:
    return SMALL.peaks(meshes()["tp 2"])


def test_memory_at_tp_2_is_two_chunks_one_of_which_travels(ranks: Ranks) -> None:
    for forward, backward in ranks(run_peaks, 4):
        gradients = SMALL.weight // 2 + SMALL.x
        assert forward <= 2 * SMALL.chunk + gradients + WORKSPACE
        # autograd copies dx into a leaf where the collective has not let go of it yet
        assert backward <= gradients + SMALL.x + FEW
