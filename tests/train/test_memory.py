"""A step's memory: exact on graphs whose storages can be counted by hand, and split without counting twice."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tpformer.train.memory import MemoryPeak, MemoryReport, measure_memory, memory_report, memory_table, snapshot

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
SIZE = 64 << 10
NUMBERS = SIZE // 4
devices = pytest.mark.parametrize("device", DEVICES, ids=str)


def scalar(device: torch.device) -> int:
    """Bytes that one number takes: CUDA's allocator gives blocks of 512."""
    return 512 if device.type == "cuda" else 4


def peak(step: Callable[[Tensor], object], device: torch.device, **options: Callable[[], int]) -> int:
    """Of a step on a vector that was there before."""
    x = torch.ones(NUMBERS, device=device, requires_grad=True)
    with measure_memory(device, **options) as memory:
        step(x)
    return memory.bytes


def chain(x: Tensor, length: int) -> Tensor:
    """exp saves its result."""
    for _ in range(length):
        x = (x * 1e-3).exp()
    return x.sum()


@devices
@pytest.mark.parametrize("length", [1, 5])
def test_a_chain_keeps_what_it_saves(length: int, device: torch.device) -> None:
    forward = peak(lambda x: chain(x, length), device)
    assert forward == (length + 1) * SIZE  # the last product is gone before the sum
    # all saved, and a gradient; or one gradient in, one out, and all but one of the saved
    backward = peak(lambda x: chain(x, length).backward(), device)
    assert backward == (length + 1) * SIZE + 2 * scalar(device)


@devices
def test_without_autograd_nothing_is_kept(device: torch.device) -> None:
    """Negative control: the tensors are as many, but freed."""
    with torch.no_grad():
        assert peak(lambda x: chain(x, 5), device) == 3 * SIZE  # a link's input, product and result


@devices
def test_views_and_changes_in_place_take_nothing(device: torch.device) -> None:
    def step(x: Tensor) -> None:
        with torch.no_grad():
            x.add_(1).view(-1, 2).t()[0].detach().mul_(2)
            y = x.clone()
            y[:10].sub_(y.view(2, -1)[0, :10])
            torch.add(x, 1, out=y)

    assert peak(step, device) == SIZE


def test_a_storage_given_to_a_tensor_is_not_a_new_one() -> None:
    storage = torch.ones(NUMBERS).untyped_storage()
    with measure_memory(torch.device("cpu")) as memory:
        torch.empty(0, dtype=torch.uint8).set_(storage)
    assert memory.bytes == 0


def test_what_stands_for_another_memory_is_left_out() -> None:
    held: list[Tensor] = []

    def step(x: Tensor) -> None:
        held.append(x.detach().clone())
        held.append(x.detach().clone())

    cpu = torch.device("cpu")
    assert peak(step, cpu) == 2 * SIZE
    assert peak(step, cpu, elsewhere=lambda: SIZE) == SIZE


def test_a_report_counts_each_storage_once() -> None:
    weight, gradients = torch.ones(10, 2), torch.zeros(30, dtype=torch.float64)
    memory = MemoryPeak()
    memory.bytes = 7
    parts = gradients.split(10)
    report = memory_report(memory, [weight, weight.view(-1), weight[3:]], [*parts, weight], [torch.ones(5), parts[0]])
    assert report == MemoryReport(parameters=80, gradients=240, optimizer=20, activations=7)
    assert report.peak == 347


def test_the_table_has_a_line_a_rank() -> None:
    table = memory_table([MemoryReport(1 << 20, 2 << 20, 3 << 20, 1 << 19), MemoryReport(0, 0, 0, 5000 << 20)])
    assert table.splitlines() == [
        "rank  parameters  gradients  optimizer  activations  peak  (MiB)",
        "   0         1.0        2.0        3.0          0.5   6.5",
        "   1         0.0        0.0        0.0       5000.0  5000.0",
    ]


@devices
def test_a_snapshot_is_written_on_cuda_only(device: torch.device, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    if device.type == "cuda":
        with snapshot(path, device):
            torch.ones(NUMBERS, device=device)
        assert path.stat().st_size > 0
    else:
        with pytest.raises(ValueError, match="needs a CUDA device, not cpu"), snapshot(path, device):
            pass
        assert not path.exists()
