"""Optimizer state in host memory: it passes through the device in chunks, while other chunks come and go."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

SLOTS = 3
"""Chunks on the device: one comes, one is worked on, one goes."""
UNIT = 1024
"""Tensors are cut at multiples of this many numbers: a CPU rounds a vector's remainder otherwise than whole vectors."""

Chunk = list[tuple[str, slice]]
"""Names, and which of the flattened tensors' numbers; together no more than a slot holds."""
Piece = tuple[str, slice, Tensor]
"""A name, which of its numbers, and these of each of its tensors, (tensors, n), on the device."""
State = Mapping[str, tuple[Tensor, ...]]


class HostState:
    """Some tensors of every parameter, in host memory (pinned, for a GPU), and the few buffers that they pass through.

    tensors: how many for each parameter. numbers: that a buffer holds of each. What is on the device does not grow
    with the model: 3 x tensors x numbers. On a CPU the same happens, one after another.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, tensors: int, numbers: int = 2 << 20):
        if numbers % UNIT:
            raise ValueError(f"numbers ({numbers}) must be a multiple of {UNIT}")
        self.numbers = numbers
        self.slots = [torch.empty(tensors, numbers, dtype=dtype, device=device) for _ in range(SLOTS)]
        self._pinned = device.type == "cuda"
        self._streams: Any = torch.get_device_module(device)
        self._coming, self._going = self._streams.Stream(), self._streams.Stream()

    def zeros(self, like: Tensor) -> Tensor:
        """Zeros of that shape, in host memory."""
        return torch.zeros(like.shape, dtype=self.slots[0].dtype, device="cpu", pin_memory=self._pinned)

    def run(self, state: State, update: Callable[[list[Piece]], None]) -> None:
        """Call `update` with all of the state, a chunk at a time; what it writes there goes back to the host.

        It does not wait for the device: `wait()` before the host reads or writes the state.
        """
        chunks = self._chunks(state)
        arrived: list[Any] = []
        left: list[Any] = []
        for stream in (self._going, self._streams.current_stream()):  # what the last run, and this step, still do
            self._coming.wait_stream(stream)
        for number, chunk in enumerate(chunks):
            for ahead in range(len(arrived), min(number + 2, len(chunks))):
                if ahead >= SLOTS:
                    self._coming.wait_event(left[ahead - SLOTS])
                arrived.append(self._fetch(state, chunks[ahead], ahead % SLOTS))
            current = self._streams.current_stream()
            current.wait_event(arrived[number])
            update(self._pieces(chunk, number % SLOTS))
            self._going.wait_stream(current)
            left.append(self._send(state, chunk, number % SLOTS))

    def wait(self) -> None:
        """Until the host has everything."""
        self._streams.synchronize()

    def _fetch(self, state: State, chunk: Chunk, slot: int) -> Any:
        with self._streams.stream(self._coming):
            for name, part, here in self._pieces(chunk, slot):
                for device, host in zip(here, state[name], strict=True):
                    device.copy_(host.view(-1)[part], non_blocking=True)
            return self._coming.record_event()

    def _send(self, state: State, chunk: Chunk, slot: int) -> Any:
        with self._streams.stream(self._going):
            for name, part, here in self._pieces(chunk, slot):
                for device, host in zip(here, state[name], strict=True):
                    host.view(-1)[part].copy_(device, non_blocking=True)
            return self._going.record_event()

    def _pieces(self, chunk: Chunk, slot: int) -> list[Piece]:
        """A chunk's places in a slot: (tensors, n) each."""
        found, start = [], 0
        for name, part in chunk:
            stop = start + part.stop - part.start
            found.append((name, part, self.slots[slot][:, start:stop]))
            start = stop
        return found

    def _chunks(self, state: State) -> list[Chunk]:
        """All numbers of all names, in order, in as few chunks as can be."""
        chunks: list[Chunk] = []
        free = 0
        for name, (first, *_) in state.items():
            start, numel = 0, first.numel()
            while start < numel:
                size = min(numel - start, free if free >= numel - start else free // UNIT * UNIT)
                if size == 0:
                    chunks.append([])
                    free = self.numbers
                    continue
                chunks[-1].append((name, slice(start, start + size)))
                start, free = start + size, free - size
        return chunks
