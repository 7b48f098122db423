"""Which number was not finite first: asked once a step's norm or loss is seen not to be, at no cost before."""

import json
import re
from typing import Any

import torch
from torch import Tensor

from tpformer.collectives import gather_texts
from tpformer.mesh import Axis, Mesh
from tpformer.random import Key

_PARTS = re.compile(r"embedding|position|norm|blocks\.\d+")


def first_not_finite(gradients: dict[str, Tensor], order: list[str], loss: Tensor, mesh: Mesh) -> str:
    """Say which parameter is the first, in the order of the forward pass, whose gradient is not finite; collective.

    order: this rank's parameters, as in named_parameters. The same words on every rank, with the ranks that have it;
    gradients that were summed over an axis are bad on all of its ranks, whichever it came from. loss: this rank's.
    """
    mine: dict[str, Any] = {"loss": bool(loss.isfinite().all()), "first": _first(gradients, order)}
    found = [json.loads(text) for text in _gather(json.dumps(mine), mesh.world)]
    losses = [rank for rank, each in enumerate(found) if not each["loss"]]
    words = f"the loss itself is not finite on {_ranks(losses)}" if losses else "the loss is finite"
    firsts = [each["first"] for each in found if each["first"]]
    if not firsts:
        return f"every gradient is finite, {'' if losses else 'their squares overflow, '}{words}"
    *_, name, kind = min(firsts)
    ranks = [rank for rank, each in enumerate(found) if each["first"] and each["first"][2] == name]
    return f"the first parameter with such a gradient is {name} ({kind}, on {_ranks(ranks)}), {words}"


@torch.no_grad()
def first_output(model: Any, samples: Tensor, micro_batch_size: int, key: Key | None) -> str:
    """Run the forward of a step again, and say whose output is the first that is not finite; collective.

    model: what has blocks and a loss, or a pipeline, of which every process looks at its own stages. "" if all is
    finite: then the loss was so as well.
    """
    stages = list(model.stages.values()) if hasattr(model, "stages") else [model]
    parts = [(name, part) for stage in stages for name, part in stage.named_modules() if _PARTS.fullmatch(name)]
    bad: list[str] = []

    def note(name: str) -> Any:
        return lambda part, args, output: None if output.isfinite().all() else bad.append(name)

    hooks = [part.register_forward_hook(note(name)) for name, part in parts]
    for number, part in enumerate(samples.split(micro_batch_size)):
        here = key and Key(key.seed, key.sample + number * micro_batch_size)
        model.loss(part[:, :-1], part[:, 1:], key=here)
    for hook in hooks:
        hook.remove()
    firsts = _gather(min(bad, key=_output_place, default=""), model.mesh.world)
    name = min(filter(None, firsts), key=_output_place, default="")
    ranks = [rank for rank, first in enumerate(firsts) if first == name]
    return f"; of all outputs that of {name} is the first, on {_ranks(ranks)}" if name else ""


def _first(gradients: dict[str, Tensor], order: list[str]) -> list[Any] | None:
    """Its place in the forward pass, its name, and nan or inf."""
    names = [name for name in order if name in gradients and gradients[name].numel()]
    if not names:
        return None
    finite = torch.stack([gradients[name].isfinite().all() for name in names]).tolist()
    if all(finite):
        return None
    name = names[finite.index(False)]
    return [*_place(name, order), name, "nan" if gradients[name].isnan().any() else "inf"]


def _place(name: str, order: list[str]) -> tuple[int, int]:
    """Comparable between pipeline stages: the number of the block, below it before and above it after all blocks."""
    blocks = [re.search(r"(?:^|\.)blocks\.(\d+)\.", each) for each in order]
    index = order.index(name)
    here = blocks[index]
    if here:
        return int(here[1]), index
    first = next((number for number, block in enumerate(blocks) if block), len(order))
    return (-1 if index < first else 1 << 30), index


def _output_place(name: str) -> int:
    """Where in the forward pass a part of a model is."""
    ends = {"embedding": -2, "position": -1, "norm": 1 << 30}
    return ends[name] if name in ends else int(name.rpartition(".")[2])


def _gather(text: str, axis: Axis) -> list[str]:
    if axis.size == 1:
        return [text]
    assert axis.group is not None
    return gather_texts(text, axis.group)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {' '.join(map(str, ranks))}"
