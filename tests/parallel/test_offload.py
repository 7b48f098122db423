"""Offloaded activations: the same numbers, in host memory meanwhile, whatever the order in which backward asks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import Ranks
from tests.parallel.test_recompute import MODELS, WAYS, selective
from tests.proofs.cases import Layout, build, build_random, llama, random_batch
from tpformer import GPT, Key, Llama, Mesh
from tpformer.parallel.offload import ActivationOffload
from tpformer.parallel.recompute import apply_recompute
from tpformer.parallel_config import ParallelConfig
from tpformer.train.memory import measure_memory

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
CPU = torch.device("cpu")
devices = pytest.mark.parametrize("device", DEVICES, ids=str)
NONE = ParallelConfig()
Gradients = dict[str, Tensor]


def everything(device: torch.device) -> ActivationOffload:
    """Offloads the smallest storages too."""
    return ActivationOffload(device, least_bytes=1)


def gradients_of(
    model: GPT | Llama, offload: ActivationOffload | None, orders: tuple[int, ...] = (0, 1, 2)
) -> Gradients:
    """Three micro-batches, forward one after another, backward in the given order; losses and gradients."""
    device = next(model.parameters()).device
    losses = []
    for number in range(3):
        tokens, targets = (x.to(device) for x in random_batch(101, seed=number))
        with offload or nullcontext():
            losses.append(model.loss(tokens, targets, key=Key(number)))
    for number in orders:
        losses[number].backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"loss {number}": loss.detach() for number, loss in enumerate(losses)}


def differences(expected: Gradients, found: Gradients) -> list[str]:
    """What is not bit for bit the same."""
    assert expected.keys() == found.keys()
    return [name for name in expected if not torch.equal(expected[name], found[name])]


def fresh(name: str, device: torch.device = CPU, config: ParallelConfig = NONE, mesh: Mesh = Mesh()) -> GPT | Llama:
    """A model with dropout."""
    model = build_random(MODELS[name], mesh, torch.float32).to(device)
    apply_recompute(model, config)
    return model


# 1. the numbers


@devices
@pytest.mark.parametrize("orders", [(0, 1, 2), (2, 1, 0), (1, 0, 2)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_come_back_in_any_order(name: str, orders: tuple[int, ...], device: torch.device) -> None:
    offload = everything(device)
    found = gradients_of(fresh(name, device), offload, orders)
    assert differences(gradients_of(fresh(name, device), None, orders), found) == []
    assert offload.host_bytes == 0


@devices
@pytest.mark.parametrize("way", WAYS)
def test_with_recomputation(way: str, device: torch.device) -> None:
    offload = everything(device)
    found = gradients_of(fresh("llama", device, WAYS[way]), offload)
    assert differences(gradients_of(fresh("llama", device), None), found) == []
    assert offload.host_bytes == 0


def run(name: str, layout: Layout) -> list[str]:
    """On a rank: what it changes."""
    mesh = layout.mesh()
    expected = gradients_of(fresh(name, mesh=mesh), None)
    found = differences(expected, gradients_of(fresh(name, mesh=mesh), everything(CPU)))
    return found + differences(expected, gradients_of(fresh(name, mesh=mesh, config=WAYS["full"]), everything(CPU)))


@pytest.mark.parametrize("layout", [Layout(2), Layout(2, 1, True)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_on_two_ranks(name: str, layout: Layout, ranks: Ranks) -> None:
    assert ranks(run, 2, name, layout) == [[], []]


@contextmanager
def forgetting(number: int) -> Iterator[None]:
    """An offload that does not bring one storage back."""
    copy, count = ActivationOffload._copy, iter(range(1 << 30))

    def careless(self: ActivationOffload, to: Tensor, source: Tensor) -> Any:
        return copy(self, to, torch.zeros_like(source) if next(count) == number else source)

    with patch.object(ActivationOffload, "_copy", careless):
        yield


@pytest.mark.parametrize("number", [0, 3, 20])
def test_one_forgotten_storage_is_noticed(number: int) -> None:
    """Negative control."""
    expected = gradients_of(fresh("gpt"), None)
    with forgetting(number):
        found = gradients_of(fresh("gpt"), everything(CPU))
    assert differences(expected, found) != []


def test_a_wrong_order_is_noticed() -> None:
    """Negative control: what was brought ahead for one is given to another of its size."""

    def mixed_up(self: ActivationOffload, kept: Any) -> tuple[Tensor, Any]:
        before = kept.before() if kept.before else None
        return start(self, kept if before is None or before.host.shape != kept.host.shape else before)

    start = ActivationOffload._start_back
    expected = gradients_of(fresh("gpt"), None)
    with patch.object(ActivationOffload, "_start_back", mixed_up):
        found = gradients_of(fresh("gpt"), everything(CPU))
    assert differences(expected, found) != []


# 2. what is moved


class Save(torch.autograd.Function):
    """Saves its inputs, and shows what backward gets of them."""

    @staticmethod
    def forward(ctx: Any, look: Callable[[tuple[Tensor, ...]], None], x: Tensor, *saved: Tensor) -> Tensor:
        ctx.look = look
        ctx.save_for_backward(*saved)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        ctx.look(ctx.saved_tensors)
        return None, dy, *(None for _ in ctx.saved_tensors)


def save(offload: ActivationOffload, *saved: Tensor) -> tuple[list[Tensor], int]:
    """What backward gets, and the bytes that were in host memory until then."""
    got: list[Tensor] = []
    with offload:
        y = Save.apply(got.extend, torch.ones((), device=offload.device, requires_grad=True), *saved)
    held = offload.host_bytes
    y.backward()
    return got, held


@devices
def test_a_storage_is_kept_once_and_its_views_are_as_they_were(device: torch.device) -> None:
    whole = torch.arange(24.0, device=device).view(4, 6)
    views = [whole, whole[:, 2:4], whole.t(), whole[1].expand(3, 6), whole[::2, ::3], whole.view(torch.int32)]
    offload = everything(device)
    got, held = save(offload, *views)
    assert held == 24 * 4
    assert len({x.untyped_storage()._cdata for x in got}) == 1
    assert got[0].data_ptr() != whole.data_ptr()
    for x, view in zip(got, views, strict=True):
        assert torch.equal(x, view)
        layout = x.dtype, x.device, x.stride(), x.storage_offset()
        assert layout == (view.dtype, view.device, view.stride(), view.storage_offset())


@devices
def test_parameters_and_small_tensors_stay(device: torch.device) -> None:
    weight = nn.Parameter(torch.ones(8, 8, device=device))
    small, large = torch.ones(15, device=device), torch.ones(16, device=device)
    offload = ActivationOffload(device, least_bytes=64)
    got, held = save(offload, weight, weight.t(), weight[:2], small, large)
    assert held == 64
    stayed = [x.data_ptr() for x in (weight, weight.t(), weight[:2], small)]
    assert [x.data_ptr() for x in got[:4]] == stayed
    assert got[4].data_ptr() != large.data_ptr()


@devices
def test_a_tensor_changed_between_two_uses_is_kept_twice(device: torch.device) -> None:
    x = torch.ones(16, device=device)
    offload = everything(device)
    got: list[Tensor] = []
    one = torch.ones((), device=device, requires_grad=True)
    with offload:
        y = Save.apply(got.extend, one, x)
        if device.type == "cuda":  # the copy may still be reading
            torch.cuda.synchronize(device)
        x.add_(1)
        y = Save.apply(got.extend, y, x)
    assert offload.host_bytes == 2 * 64
    y.backward()
    assert [float(x[0]) for x in got] == [2.0, 1.0]


@devices
def test_backward_twice_and_not_at_all(device: torch.device) -> None:
    model, offload = fresh("gpt", device), everything(device)
    tokens, targets = (x.to(device) for x in random_batch(101))
    with offload:
        x = model.hidden_states(tokens).square().mean()
    x.backward(retain_graph=True)
    once = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    x.backward()
    assert all(p.grad is not None and torch.equal(p.grad, 2 * grad) for p, grad in once.items())
    with offload:
        x = model.loss(tokens, targets)
    assert offload.host_bytes > 0
    del x
    assert offload.host_bytes == 0


def test_recomputation_offloads_what_it_keeps_and_no_more() -> None:
    """Of a block its input, and the rotary table that all share."""
    held = []
    for layers in (2, 3):
        model, offload = build(llama(num_layers=layers)), everything(CPU)
        apply_recompute(model, WAYS["full"])
        with offload:
            loss = model.loss(*random_batch(101))
        held.append(offload.host_bytes)
        loss.backward()
    assert held[1] - held[0] == 4 * 8 * 32 * 4


# 3. the memory, and the transfers


@devices
@pytest.mark.parametrize("config", [NONE, WAYS["full"], selective("mlp")], ids=["none", "full", "mlp"])
def test_less_is_alive_on_the_device(config: ParallelConfig, device: torch.device) -> None:
    def grown(offloads: bool) -> float:
        """Bytes of a block."""
        peaks = []
        for layers in (6, 8):  # more than are brought ahead
            model = build(llama(num_layers=layers, hidden_size=64, ffn_hidden_size=160, max_seq_len=128)).to(device)
            apply_recompute(model, config)
            tokens, targets = torch.randint(101, (2, 4, 128), device=device)
            model.loss(tokens, targets).backward()  # gradients are there from now on
            offload = ActivationOffload(device, least_bytes=1 << 14)
            with measure_memory(device, elsewhere=partial(getattr, offload, "host_bytes")) as memory:
                with offload if offloads else nullcontext():
                    loss = model.loss(tokens, targets)
                loss.backward()
            peaks.append(memory.bytes)
        return (peaks[1] - peaks[0]) / 2

    kept = 4 * 128 * 64 * 4  # a block's input
    assert grown(False) >= kept
    assert grown(True) < kept / 10


@devices
def test_what_backward_asks_for_next_is_on_its_way(device: torch.device) -> None:
    """Storages brought back when asked for: of a chain only the last; all the others have been started before."""
    asked: list[bool] = []
    bring_back = ActivationOffload._bring_back

    def watched(self: ActivationOffload, kept: Any) -> Any:
        asked.append(kept in self._ahead)
        return bring_back(self, kept)

    x = torch.ones(16, device=device, requires_grad=True)
    with patch.object(ActivationOffload, "_bring_back", watched):
        with everything(device):
            y = x
            for _ in range(10):
                y = y.exp().clone()
        y.sum().backward()
    assert asked == [False] + [True] * 9
