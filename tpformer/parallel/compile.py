"""torch.compile, one decoder block at a time: one program for all blocks, and none of its own for each step."""

from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor, nn

from tpformer.layers.block import DecoderBlock
from tpformer.layers.cache import BlockCache
from tpformer.overlap import overlap_mode
from tpformer.random import Key, TracedKey


def compile_blocks(model: nn.Module, *, backend: str = "inductor") -> None:
    """Have torch.compile run every DecoderBlock of a model, each whole: what it cannot trace raises at the first step.

    Without gradients (evaluation, sampling) a block stays as it is: lengths vary there, and each would be a program.
    Parameter names do not change. What is hooked to a block (fully_shard), or put around its forward afterwards
    (torch.utils.checkpoint), stays outside. Weights' gradients come from autograd, never straight to a GradientSum.
    backend: of torch.compile.
    """
    torch.compiler.assume_constant_result(overlap_mode)  # decided once a process group, when layers were built
    for block in model.modules():
        if isinstance(block, DecoderBlock):
            # bound to the block, so that a copy of the model is bound to its own
            block.forward = MethodType(_compiled(type(block).forward, backend), block)  # type: ignore[method-assign]


def _compiled(eager: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    """A block's forward, compiled where there are gradients."""
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend=backend)

    def forward(
        block: DecoderBlock,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        key: Key | None = None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        if not torch.is_grad_enabled() or cache is not None:
            return eager(block, x, rope, key, cache)
        return compiled(block, x, rope, None if key is None else TracedKey.of(key))

    return forward
