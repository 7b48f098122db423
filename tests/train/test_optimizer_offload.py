"""Optimizer state in host memory: the numbers are those of the resident optimizer bit for bit, and little is on the
device; whatever order the device's streams take, as far as their waits allow.

On a GPU the tests of steps run there.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import Ranks
from tests.proofs.cases import Layout, build, llama
from tests.train.runs import config, corpus, records
from tpformer import Mesh
from tpformer.parallel.data import GradientBuckets
from tpformer.parallel_config import ParallelConfig
from tpformer.train import optimizer as optimizer_module
from tpformer.train.optimizer import Optimizer
from tpformer.train.optimizer_offload import SLOTS, UNIT, HostState, Piece
from tpformer.train.schedule import OptimizerConfig
from tpformer.train.step import StepOptions, train_step
from tpformer.train.trainer import Trainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [None, torch.float64, torch.bfloat16, torch.float16]
CONFIG = OptimizerConfig(lr=0.01)


class Uneven(nn.Module):
    """Tensors of no numbers, one, a few, and several chunks, whose sizes nothing divides; one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for number, shape in enumerate([(), (5,), (61, 53), (0, 3), (2, 3, 2), (1024, 3), (2999,)]):
            self.register_parameter(f"p{number}", nn.Parameter(torch.randn(shape, generator=generator)))
        self.get_parameter("p4").requires_grad_(False)


def optimizer_of(model: nn.Module, dtype: torch.dtype | None, offload: bool, numbers: int = UNIT) -> Optimizer:
    """With chunks so small that there are many."""
    with patch.object(optimizer_module, "HostState", partial(HostState, numbers=numbers)):
        return Optimizer(model, Mesh(device=DEVICE), CONFIG, dtype, offload=offload)


def some_steps(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
    """Steps first..last - 1, with gradients of their own."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        gradients = {
            name: (torch.randn(p.shape, generator=generator) * optimizer.loss_scale).to(DEVICE, optimizer_dtype(p))
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        optimizer.step(gradients, 0.01, torch.zeros((), device=DEVICE))


def optimizer_dtype(p: Tensor) -> torch.dtype:
    """Of its gradient."""
    return torch.promote_types(p.dtype, torch.float32)


def all_numbers(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The weights, and the state."""
    return {name: p.detach().cpu() for name, p in model.named_parameters()} | {
        name: tensor.cpu().clone() for name, tensor in optimizer.state().items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names whose numbers differ in any bit; the names agree."""
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]


# the numbers


@pytest.mark.parametrize("numbers", [UNIT, 4 * UNIT, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_for_bit_the_resident_optimizer(dtype: torch.dtype | None, numbers: int) -> None:
    """Weights and state after four steps."""
    found = []
    for offload in (False, True):
        model = Uneven().to(DEVICE)
        optimizer = optimizer_of(model, dtype, offload, numbers)
        some_steps(model, optimizer, 0, 4)
        found.append(all_numbers(model, optimizer))
    assert same(*found) == []
    assert not torch.equal(found[0]["p2"].float(), Uneven().get_parameter("p2"))
    assert torch.equal(found[0]["weight/p4"].float(), Uneven().get_parameter("p4")), "it is frozen"


@pytest.mark.parametrize("order", [(False, True), (True, False)], ids=["taken over", "given back"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_state_goes_from_one_to_the_other(dtype: torch.dtype | None, order: tuple[bool, bool]) -> None:
    """Two steps in one and two in the other are four of the resident one."""
    straight = Uneven().to(DEVICE)
    expected = optimizer_of(straight, dtype, False)
    some_steps(straight, expected, 0, 4)
    first, second = Uneven().to(DEVICE), Uneven().to(DEVICE)
    one, other = (optimizer_of(m, dtype, offload) for m, offload in zip((first, second), order, strict=True))
    some_steps(first, one, 0, 2)
    other.load_state(one.state(), one.steps)
    some_steps(second, other, 2, 4)
    assert same(all_numbers(straight, expected), all_numbers(second, other)) == []


def losses_on(layout: Layout, dtype: torch.dtype | None) -> list[list[float]]:
    """On a rank: the losses of three training steps, resident and offloaded."""
    mesh, found = layout.mesh(), []
    for offload in (False, True):
        model = build(llama(num_kv_heads=2), mesh)
        optimizer, buckets = Optimizer(model, mesh, CONFIG, dtype, offload=offload), GradientBuckets(model, mesh)
        samples = torch.randint(101, (4, 9), generator=torch.Generator().manual_seed(0))
        samples = samples.chunk(mesh.dp.size)[mesh.dp.rank]
        reports = [
            train_step(model, buckets, optimizer, samples, StepOptions(micro_batch_size=1, lr=0.01)) for _ in range(3)
        ]
        found.append([report.loss for report in reports])
    return found


def test_training_on_ranks_is_the_same(ranks: Ranks) -> None:
    for resident, offloaded in ranks(losses_on, 2, Layout(2, 1, True), torch.bfloat16):
        assert len(set(resident)) == 3
        assert offloaded == resident


def test_the_trainer_s_flag_and_its_checkpoints(tmp_path: Path) -> None:
    """A run that offloads, stops, and goes on without offloading, is the run that never offloads."""

    def run(directory: str, offload: bool, **options: Any) -> None:
        parallel = ParallelConfig(precision="bf16", offload_optimizer=offload)
        (tmp_path / directory).mkdir(exist_ok=True)
        settings = replace(config(sample_tokens=0, **options), parallel=parallel)
        trainer = Trainer(settings, Mesh(), corpus(), tmp_path / directory)
        assert (trainer.optimizer._host is not None) is offload
        while trainer.step < trainer.config.run.steps:
            trainer._log(**trainer._numbers(trainer._train_step()))
        trainer.save()
        trainer.checkpoints.wait()

    run("resident", False, steps=4)
    run("offloaded", True, steps=2)
    run("offloaded", False, steps=4, resume=True)
    assert len(expected := records(tmp_path / "resident")) == 4
    assert records(tmp_path / "offloaded") == expected


# the memory


@pytest.mark.parametrize(("dtype", "tensors"), [(None, 2), (torch.bfloat16, 3)], ids=str)
def test_what_the_device_holds_does_not_grow_with_the_model(dtype: torch.dtype | None, tensors: int) -> None:
    """A few buffers of fixed size; the rest is host memory of its own, pinned for a GPU."""
    for model in (Uneven(), nn.Linear(300, 300)):
        model.to(DEVICE)
        optimizer = optimizer_of(model, dtype, True)
        some_steps(model, optimizer, 0, 1)
        assert optimizer._host is not None
        slots = optimizer._host.slots
        assert sum(slot.nbytes for slot in slots) == SLOTS * tensors * UNIT * 4
        on_device = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *slots)}
        held = [t for both in optimizer._moments.values() for t in both]
        if tensors == 3:
            held += list(optimizer.masters.values())
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        assert sum(t.numel() for t in held) >= tensors * sum(trained)
        for t in held:
            assert t.device.type == "cpu"
            assert t.is_pinned() is (DEVICE.type == "cuda")
            assert t.numel() == 0 or t.untyped_storage().data_ptr() not in on_device
        assert not any(name.endswith("p4") for name in optimizer._moments), "it is frozen"


@pytest.mark.parametrize("numbers", [UNIT, 3 * UNIT])
def test_chunks_are_every_number_once_and_fit(numbers: int) -> None:
    """Cut at multiples of UNIT only, in as few chunks as the numbers need."""
    state = {name: (p.detach(),) for name, p in Uneven().named_parameters()}
    chunks = HostState(torch.device("cpu"), torch.float32, 1, numbers)._chunks(state)
    total = sum(tensor.numel() for (tensor,) in state.values())
    sizes = [sum(part.stop - part.start for _, part in chunk) for chunk in chunks]
    assert sum(sizes) == total
    assert max(sizes) <= numbers
    assert len(chunks) <= total // (numbers - UNIT + 1) + 1 if numbers > UNIT else len(chunks) <= 2 * total // UNIT
    for name, (tensor,) in state.items():
        parts = [part for chunk in chunks for other, part in chunk if other == name]
        edges = [0, *(part.stop for part in parts)]
        assert [part.start for part in parts] == edges[:-1]
        assert edges[-1] == tensor.numel()
        assert all(edge % UNIT == 0 for edge in edges[:-1])
    with pytest.raises(ValueError, match="multiple of 1024"):
        HostState(torch.device("cpu"), torch.float32, 1, 1000)


def test_weights_of_two_dtypes_are_refused() -> None:
    model = Uneven()
    model.register_parameter("other", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"weights of one dtype, not torch\.float32, torch\.float64"):
        Optimizer(model, Mesh(), CONFIG, offload=True)


# the order


class Queue:
    """Work in order, that is done later; `deaf` streams do not wait."""

    def __init__(self, deaf: bool = False) -> None:
        self.todo: list[Callable[[], bool]] = []
        self.deaf = deaf

    def add(self, work: Callable[[], Any]) -> None:
        self.todo.append(lambda: (work(), True)[1])

    def record_event(self) -> list[bool]:
        event: list[bool] = []
        self.add(lambda: event.append(True))
        return event

    def wait_event(self, event: list[bool]) -> None:
        if not self.deaf:
            self.todo.append(lambda: bool(event))

    def wait_stream(self, other: "Queue") -> None:
        self.wait_event(other.record_event())


class Streams(TorchDispatchMode):
    """What torch.cuda is to HostState: copies are work of the current stream, done when it is asked for."""

    def __init__(self, deaf: str = "") -> None:
        super().__init__()
        self.current = self.main = Queue(deaf == "main")
        self.new = iter([Queue(deaf == "coming"), Queue(deaf == "going")])
        self.all = [self.main]

    def Stream(self) -> Queue:
        self.all.append(next(self.new))
        return self.all[-1]

    def current_stream(self) -> Queue:
        return self.current

    @contextmanager
    def stream(self, stream: Queue) -> Iterator[None]:
        self.current = stream
        yield
        self.current = self.main

    def run(self, order: tuple[int, ...]) -> None:
        """Do everything; always the next piece of work of the first stream, in this order, that need not wait."""
        streams = [self.all[number] for number in order]
        while any(stream.todo for stream in streams):
            assert any(stream.todo and stream.todo[0]() and [stream.todo.pop(0)] for stream in streams), "a deadlock"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.current.add(lambda: func(*args, **(kwargs or {})))
            return args[0]
        return func(*args, **(kwargs or {}))


def two_runs(order: tuple[int, ...], deaf: str = "") -> bool:
    """Whether twice "x = 2 x + 1" on everything, its work done in that order, gives that on the host."""
    streams = Streams(deaf)
    with patch.object(torch, "get_device_module", lambda device: streams):
        host = HostState(torch.device("cpu"), torch.float32, 2, UNIT)
    state = {f"{i}": tuple(torch.randn(1500) for _ in range(2)) for i in range(5)}
    expected = {name: [x.mul(2).add(1).mul(2).add(1) for x in tensors] for name, tensors in state.items()}

    def update(chunk: list[Piece]) -> None:
        for _, _, x in chunk:
            streams.main.add(partial(lambda x: x.mul_(2).add_(1), x))

    for slot in host.slots:
        slot.fill_(torch.nan)
    with streams:
        host.run(state, update)
        host.run(state, update)
    streams.run(order)
    return all(torch.equal(a, b) for name in state for a, b in zip(state[name], expected[name], strict=True))


ORDERS = list(itertools.permutations(range(3)))


def test_any_order_that_the_waits_allow_is_right() -> None:
    assert all(two_runs(order) for order in ORDERS)


@pytest.mark.parametrize("deaf", ["main", "coming", "going"])
def test_a_stream_that_does_not_wait_would_be_seen(deaf: str) -> None:
    """The controls: the update before its numbers are there, a buffer filled while it is in use, one sent too early."""
    assert not all(two_runs(order, deaf) for order in ORDERS)
