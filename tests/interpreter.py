"""Triton's interpreter without what it works out in vain, or anew at every operation: the same bits, much sooner.

It checks each sum and product of integers for overflow, in 64 bits, and throws the answer away unless it debugs; it
lists all of triton.language at every call of a function, and makes the same table of types at every operation.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch


@contextmanager
def quick() -> Iterator[None]:
    """Inside, interpreted kernels run so; nothing changes where Triton is absent or compiles."""
    try:
        import triton
    except ImportError:
        yield
        return
    with ExitStack() as stack:
        if triton.knobs.runtime.interpret:
            from triton.runtime import interpreter

            builder, options = interpreter.interpreter_builder, interpreter.interpreter_builder.options
            unchecked = replace(options, sanitize_overflow=options.sanitize_overflow and options.debug)
            stack.enter_context(patch.object(builder, "options", unchecked))
            stack.enter_context(patch.object(interpreter, "inspect", _inspect(interpreter.tl)))
            stack.enter_context(patch.object(interpreter, "_get_np_dtype", _kept(interpreter._get_np_dtype)))
            core, semantic = interpreter.tl.core, type(interpreter.interpreter_semantic)
            stack.enter_context(patch.object(core.block_type, "__init__", _same_blocks(core.block_type.__init__)))
            stack.enter_context(patch.object(core.tensor, "__init__", _same_shapes(core.tensor.__init__)))
            broadcast = _unless_alike(semantic.broadcast_impl_value)
            stack.enter_context(patch.object(semantic, "broadcast_impl_value", broadcast))
        yield


def _inspect(tl: Any) -> SimpleNamespace:
    """The module inspect, whose getmembers() of Triton's parts gives only what the interpreter is to replace."""
    parts = [tl, tl.core, tl.tensor, tl.math, getattr(tl.core, "tensor_descriptor_base", tl)]
    names = {part: [name for name, x in inspect.getmembers(part) if tl.core.is_builtin(x)] for part in parts}

    def getmembers(part: Any, *conditions: Any) -> list[tuple[str, Any]]:
        if conditions or part not in names:
            return inspect.getmembers(part, *conditions)
        if not tl.core.is_builtin(getattr(part, names[part][0])):
            return []  # replaced already, by the function that calls this one
        return [(name, getattr(part, name)) for name in names[part]]

    return SimpleNamespace(**(vars(inspect) | {"getmembers": getmembers}))


def _kept(numpy_type_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same function of a type of Triton; a block's is its elements'."""
    known: dict[str, Any] = {}

    def find(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = numpy_type_of(kind.scalar)
        return known[name]

    return find


def _same_blocks(build: Callable[..., None]) -> Callable[..., None]:
    """A block's type of an element and a shape is worked out once."""
    known: dict[Any, dict[str, Any]] = {}

    def initialize(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *shape
        if key in known:
            self.__dict__.update(known[key])
        else:
            build(self, element_ty, shape)
            known[key] = dict(self.__dict__)

    return initialize


def _same_shapes(build: Callable[..., None]) -> Callable[..., None]:
    """Tensors of the same type share what describes their shape."""
    known: dict[str, dict[str, Any]] = {}

    def initialize(self: Any, handle: Any, type: Any) -> None:
        if type.name in known:
            self.__dict__.update(known[type.name], handle=handle)
        else:
            build(self, handle, type)
            known[type.name] = {name: value for name, value in self.__dict__.items() if name != "handle"}

    return initialize


def _unless_alike(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """Blocks of one shape, and two numbers, are broadcast already."""

    def maybe(self: Any, one: Any, other: Any) -> Any:
        a, b = one.type, other.type
        if a.is_block() is b.is_block() and (not a.is_block() or [*a.shape] == [*b.shape]):
            return one, other
        return broadcast(self, one, other)

    return maybe
