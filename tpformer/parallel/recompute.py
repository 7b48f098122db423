"""Recomputation: backward runs a module's forward again instead of keeping what it saved (arXiv 1604.06174)."""

from functools import partial
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from tpformer.parallel_config import ParallelConfig


def apply_recompute(model: nn.Module, config: ParallelConfig) -> None:
    """Have every `recompute_every`-th block of `model.blocks`, by its global number, recompute what config says.

    full: the whole block, of which its input is kept. selective: each of `recompute_modules`, named as below the
    block (arXiv 2205.05198, section 5). Parameters, their names and the hooks on a module stay as they are; so do the
    numbers, since dropout masks come from keys. Recomputation stops at the last tensor that backward needs, so that
    only the collectives before it run again; of a compiled block all do.
    Raises ValueError for a module that a block does not have.
    """
    blocks: Any = model.blocks
    for name, block in blocks.items():
        targets = _targets(block, config)
        if int(name) % config.recompute_every == 0:
            for target in targets:
                _recompute(target)


def _targets(block: nn.Module, config: ParallelConfig) -> list[nn.Module]:
    """The modules of a block that are to be recomputed."""
    if config.recompute == "none":
        return []
    if config.recompute == "full":
        return [block]
    modules = {name: module for name, module in block.named_modules() if name}
    unknown = [name for name in config.recompute_modules if name not in modules]
    if unknown:
        raise ValueError(f"recompute_modules ({', '.join(unknown)}) must be among a block's: {', '.join(modules)}")
    return [modules[name] for name in config.recompute_modules]


def _recompute(module: nn.Module) -> None:
    # what __call__ runs between a module's hooks; bound methods and no closures, so that a deep copy of the model gets
    # those of the copy
    if "forward" in vars(module):  # compiled, or somebody's own
        module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
    else:  # one function for all blocks: torch.compile would take a partial of each for another program
        module.forward = MethodType(_again, module)


def _again(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = type(module).forward
    return checkpoint(forward, module, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
