"""What the kernels' tests share: where they run, guarded memory, small tables, and how near is near enough."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch._dynamo  # it looks at torch's functions when it is imported: before some are patched here
from torch import Tensor

from tpformer_kernels import norm_ops, tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16)
"""What the interpreter rounds as a device does; bf16 is proved on a device."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}
CANARY_BYTES, CANARY = 1 << 15, 0x55
NAN = 0xFF
"""Bytes that are NaN in every floating dtype, and -1 in every integer one."""
TINY = {"BLOCK": 16, "BLOCK_ROWS": 2, "BLOCK_HEADS": 2, "PROGRAMS": 2, "BLOCK_M": 16, "BLOCK_N": 16}


class Buffer(NamedTuple):
    """Bytes between two canaries."""

    whole: Tensor
    size: int
    canary: int

    def view(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The bytes in the middle, as a tensor that autograd does not take for a view."""
        storage, offset = self.whole.untyped_storage(), CANARY_BYTES // dtype.itemsize
        stride = torch.empty(shape, device="meta").stride()
        return torch.tensor([], dtype=dtype, device=self.whole.device).set_(storage, offset, shape, stride)

    def intact(self) -> bool:
        before, after = self.whole[:CANARY_BYTES], self.whole[CANARY_BYTES + self.size :]
        return bool((before == self.canary).all() and (after == self.canary).all())


class Guard:
    """All memory that was handed out between canaries."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, canary: int) -> Tensor:
        """A tensor of NaN between canaries."""
        size = torch.Size(shape).numel() * dtype.itemsize
        whole = torch.full((size + 2 * CANARY_BYTES,), canary, dtype=torch.uint8, device=device)
        whole[CANARY_BYTES : CANARY_BYTES + size] = NAN
        self.buffers.append(Buffer(whole, size, canary))
        return self.buffers[-1].view(shape, dtype)

    def copy(self, x: Tensor) -> Tensor:
        """A contiguous copy of an input between NaN, so that what is read beyond it shows in every result."""
        return self.empty(x.shape, x.dtype, x.device, NAN).copy_(x.detach())

    def owns(self, x: Tensor) -> bool:
        return any(x.untyped_storage().data_ptr() == b.whole.untyped_storage().data_ptr() for b in self.buffers)

    def bytes(self) -> int:
        return sum(b.size for b in self.buffers)


@contextmanager
def guarded() -> Iterator[Guard]:
    """What is allocated inside is NaN between canaries; raises AssertionError if a canary was written to."""
    guard, empty = Guard(), torch.empty

    def allocate(shape: Any, like: Tensor | None = None, **options: Any) -> Tensor:
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        dtype = options.get("dtype") or (like.dtype if like is not None else torch.get_default_dtype())
        device = options.get("device") or (like.device if like is not None else "cpu")
        if str(device) == "meta":
            return empty(shape, dtype=dtype, device=device)
        return guard.empty(shape, dtype, device, CANARY)

    with (
        patch.object(torch.Tensor, "new_empty", lambda x, *shape, **options: allocate(shape, x, **options)),
        patch.object(torch, "empty_like", lambda x, **options: allocate(x.shape, x, **options)),
        patch.object(torch, "empty", lambda *shape, **options: allocate(shape, **options)),
    ):
        yield guard
    assert all(b.intact() for b in guard.buffers), "a kernel wrote outside its tensors"


@contextmanager
def replaced(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Another function of that name in every module of the kernels that uses it."""
    with ExitStack() as stack:
        for path, module in list(sys.modules.items()):
            if path.startswith("tpformer_kernels.") and hasattr(module, name):
                stack.enter_context(patch.object(module, name, function))
        yield


@contextmanager
def small_tables() -> Iterator[None]:
    """Blocks and numbers of programs so small that few numbers need several of each."""
    real = tables.options

    def options(kernel: str, size: int, device: torch.device) -> dict[str, int]:
        found = {name: TINY.get(name, value) for name, value in real(kernel, size, device).items()}
        return found | {"PROGRAMS": 8} if kernel == "cross_entropy_statistics" else found

    norms = patch.multiple(norm_ops, WIDE_FORWARD=24, WIDE_BACKWARD=20)
    with replaced("options", options), norms, patch("tpformer_kernels.softmax.WIDE", 20):
        yield


class Result(NamedTuple):
    """What a function gave, what it was given for backward, and its inputs' gradients."""

    outputs: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


def evaluate(
    function: Callable[..., Any], inputs: Sequence[Tensor], trained: int, cotangents: Sequence[Tensor] | None = None
) -> Result:
    """The outputs of function(*inputs), and the gradients of the first `trained` inputs; strides stay as they are."""
    leaves = [x.detach().requires_grad_(i < trained) for i, x in enumerate(inputs)]
    outputs = outputs_of(function(*leaves))
    if not trained:
        return Result(outputs, (), ())
    if cotangents is None:
        cotangents = [torch.randn(y.shape, device=y.device).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves[:trained], cotangents)
    return Result(tuple(y.detach() for y in outputs), tuple(cotangents), gradients)


def outputs_of(result: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """An op's one or several outputs as several."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def exact(function: Callable[..., Any], inputs: Sequence[Tensor], trained: int, cotangents: Sequence[Tensor]) -> Result:
    """The same in fp64, of the same numbers."""
    return evaluate(function, [doubled(x) for x in inputs], trained, [doubled(x) for x in cotangents])


def doubled(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def assert_near(ours: Result, expected: Result, tolerance: float) -> None:
    """Every output and gradient is right, relative to itself or, where sums cancel, to the largest number (or 1)."""
    for kind in ("outputs", "gradients"):
        for i, (x, y) in enumerate(zip(getattr(ours, kind), getattr(expected, kind), strict=True)):
            close(x, y, tolerance, f"{kind}[{i}]")


def close(x: Tensor, y: Tensor, tolerance: float, name: str = "") -> None:
    finite = y[y.isfinite()].abs()
    scale = max(1.0, finite.max().item() if finite.numel() else 0.0)
    torch.testing.assert_close(
        x.double(), y.double(), rtol=tolerance, atol=tolerance * scale, msg=lambda text: f"{name}: {text}"
    )


def assert_as_good_as_torch(ours: Tensor, theirs: Tensor, expected: Tensor, atol: float) -> None:
    """The rule of two: our error is at most twice that of torch's own op in the same dtype (and atol)."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape == expected.shape
    mine, torchs = ((x.double() - expected).abs().max().item() for x in (ours, theirs))
    assert mine <= 2 * torchs + atol, f"error {mine:.2e}, torch's own {torchs:.2e}"
