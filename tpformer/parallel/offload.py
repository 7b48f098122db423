"""What backward needs, kept in host memory between forward and backward."""

import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils.weak import WeakIdKeyDictionary

LEAST_BYTES = 1 << 20
"""A smaller storage stays where it is: to move it costs more than it gives."""
LEAVING = 2
"""Copies to the host under way at most, with what they copy: the next one has the device wait for the oldest."""
AHEAD = 4
"""Storages brought back before they are asked for: about what one operator saves."""


class ActivationOffload:
    """Moves what autograd saves to the host, and back when backward asks for it: `with offload: loss = ...`.

    A storage is copied whole, and once, however many tensors in it are saved: one saved view keeps all of it alive.
    On CUDA a stream of its own copies, to and from pinned memory, beside the computation. On a CPU the copies are
    real too, but save nothing. Parameters and views of them stay, and so does what is smaller than least_bytes, on
    another device, or of a subclass of Tensor. The numbers are the same bit for bit. What was saved must not be
    changed in place before backward: autograd cannot see that here.
    One object serves any number of steps, and of micro-batches under way. Source: arXiv 1602.08124.
    """

    def __init__(self, device: torch.device, *, least_bytes: int = LEAST_BYTES):
        self.device, self.least_bytes = device, least_bytes
        self.host_bytes = 0
        """Held in host memory now."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: deque[tuple[Tensor, Any]] = deque()  # what is on its way to the host, until when
        self._ahead: dict[_Kept, tuple[Tensor, Any]] = {}  # what is on its way back, until when
        self._copies = WeakIdKeyDictionary()  # of a storage on the device: its version, and a weak _Kept
        self._latest: weakref.ref[_Kept] | None = None
        self._hooks: list[torch.autograd.graph.saved_tensors_hooks] = []

    def __enter__(self) -> "ActivationOffload":
        while self._ahead:  # of a graph that was dropped; at worst it is brought back once more
            self._wait(self._ahead.popitem()[1])
        self._hooks.append(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
        self._hooks[-1].__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.pop().__exit__(*error)
        while self._leaving:
            self._wait(self._leaving.popleft())

    def _pack(self, x: Tensor) -> Any:
        plain = type(x) is Tensor and x.layout == torch.strided and x.device.type == self.device.type
        if not plain or isinstance(x._base, nn.Parameter) or x.untyped_storage().nbytes() < self.least_bytes:
            return x
        return self._keep(x), x.dtype, x.storage_offset(), x.size(), x.stride()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        kept, dtype, offset, size, stride = packed
        storage = self._bring_back(kept)
        self._bring_ahead(kept)
        return torch.empty(0, dtype=dtype, device=self.device).set_(storage, offset, size, stride)

    def _keep(self, x: Tensor) -> "_Kept":
        """The copy of x's storage, made unless there is one."""
        storage = x.untyped_storage()
        version, copied = self._copies.get(storage, (-1, None))
        kept = copied() if copied is not None and version == x._version else None
        if kept is not None:
            return kept
        whole = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
        self.host_bytes += storage.nbytes()
        kept = _Kept(torch.empty_like(whole, device="cpu", pin_memory=self._stream is not None), self._latest)
        weakref.finalize(kept, self._forget, storage.nbytes())
        while len(self._leaving) >= (LEAVING if self._stream else 1):
            self._wait(self._leaving.popleft())
        if (done := self._copy(kept.host, whole)) is not None:
            self._leaving.append((whole, done))
        self._latest = weakref.ref(kept)
        self._copies[storage] = x._version, self._latest
        return kept

    def _forget(self, size: int) -> None:
        self.host_bytes -= size

    def _bring_back(self, kept: "_Kept") -> UntypedStorage:
        """Its storage on the device: the one that another saved tensor is using, one that is coming, or a new one."""
        storage = kept.back() if kept.back else None
        if storage is None:
            coming = self._ahead.pop(kept, None) or self._start_back(kept)
            storage = self._wait(coming).untyped_storage()
            kept.back = weakref.ref(storage)
        return storage

    def _bring_ahead(self, kept: "_Kept") -> None:
        """Start to bring back what was packed before it, which backward is going to ask for next."""
        for _ in range(AHEAD):
            before = kept.before() if kept.before else None
            if before is None or len(self._ahead) >= AHEAD:
                return
            kept = before
            if kept not in self._ahead and (kept.back is None or kept.back() is None):
                self._ahead[kept] = self._start_back(kept)

    def _start_back(self, kept: "_Kept") -> tuple[Tensor, Any]:
        whole = torch.empty_like(kept.host, device=self.device)
        return whole, self._copy(whole, kept.host)

    def _copy(self, to: Tensor, source: Tensor) -> Any:
        """Copy, on CUDA beside the current stream after what it has been given; the event at the end of that."""
        if self._stream is None:
            to.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def _wait(self, copy: tuple[Tensor, Any]) -> Tensor:
        """Have the current stream wait for a copy: then its memory on the device may be used, or given up.

        Rather than record_stream, after which the allocator takes memory back late, when the host runs ahead.
        """
        on_device, done = copy
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)
        return on_device


class _Kept:
    """A storage in host memory: its bytes, what was packed before it, and where on the device it is again."""

    def __init__(self, host: Tensor, before: "weakref.ref[_Kept] | None"):
        self.host, self.before = host, before
        self.back: weakref.ref[UntypedStorage] | None = None
