"""torch.compile, one decoder block at a time: one program for all blocks, and none of its own for each step."""

from typing import Any

import torch
from torch import Tensor, nn

from tpformer.layers.block import DecoderBlock
from tpformer.overlap import overlap_mode
from tpformer.random import Key, TracedKey


def compile_blocks(model: nn.Module, *, backend: str = "inductor") -> None:
    """Have torch.compile run every DecoderBlock of a model, whole: what it cannot trace raises, at the first step.

    Without gradients (evaluation, sampling) a block stays as it is: there lengths vary, and each would be compiled.
    Parameter names do not change. What is hooked to a block (fully_shard), or put around its forward afterwards
    (torch.utils.checkpoint), stays outside. A gradient of a compiled block comes from autograd, not to a GradientSum.
    backend: of torch.compile.
    """
    torch.compiler.assume_constant_result(overlap_mode)  # decided once a process group, and known to the layers
    for block in model.modules():
        if isinstance(block, DecoderBlock):
            block.forward = _compiled(block.forward, backend)  # type: ignore[method-assign]


def _compiled(eager: Any, backend: str) -> Any:
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend=backend)

    def forward(x: Tensor, rope: tuple[Tensor, Tensor] | None = None, key: Key | None = None) -> Tensor:
        if not torch.is_grad_enabled():
            return eager(x, rope, key)
        return compiled(x, rope, None if key is None else TracedKey.of(key))

    return forward
