"""Triton where it is installed; elsewhere stand-ins, so that an op's file can still be imported for its reference."""

from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
    INTERPRETED: bool = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on CPU tensors, slowly
except ImportError:
    triton, tl, INTERPRETED = None, SimpleNamespace(constexpr=object), False

    def jit(function: Any = None, **options: Any) -> Any:
        """Leave a kernel as it is: nothing will launch it."""
        return function if function is not None else jit


__all__ = ["INTERPRETED", "jit", "tl", "triton"]
