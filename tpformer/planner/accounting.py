"""Bytes of weights, gradients and optimizer state for each parameter, by precision and optimizer; of any model."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from torch import nn

from tpformer.models.decoder import Part
from tpformer.parallel.split import part_of, stage_parts
from tpformer.parallel.state_bytes import state_bytes
from tpformer.parallel_config import DataParallel, ParallelConfig, Precision
from tpformer.placement import local_part, mesh_of, placements
from tpformer.planner.candidate import ModelConfig, check_tp
from tpformer.planner.weights import Weight, block_weights, end_weights

OptimizerName = Literal["SGD", "momentum", "AdamW", "AdamW 8-bit"]
GradientBytes = Literal["fp32", "narrow", "both"]

MOMENTS: dict[OptimizerName, int] = {"SGD": 0, "momentum": 4, "AdamW": 8, "AdamW 8-bit": 2}
"""Bytes a parameter; of 8-bit ones (arXiv 2110.02861) without the scales of their blocks."""
GRADIENTS: dict[GradientBytes, int] = {"fp32": 4, "narrow": 2, "both": 6}
"""Bytes a parameter: summed in fp32; in what the model computes in (arXiv 1910.02054); that, and its fp32 sum too."""


@dataclass(frozen=True)
class Recipe:
    """What is kept of a parameter; ours is AdamW with fp32 gradients, the others are there to be compared with."""

    precision: Precision = "fp32"
    optimizer: OptimizerName = "AdamW"
    gradients: GradientBytes = "fp32"

    def __post_init__(self) -> None:
        if self.precision == "fp32" and self.gradients != "fp32":
            raise ValueError(f"gradients ({self.gradients!r}) of precision fp32 are fp32")

    @property
    def ours(self) -> bool:
        """Whether tpformer's trainer keeps it so."""
        return self.optimizer == "AdamW" and self.gradients == "fp32"

    @property
    def copy(self) -> int:
        """Bytes of what the model computes with, where that is not the fp32 weight."""
        return 0 if self.precision == "fp32" else 2

    @property
    def bytes(self) -> int:
        """Of each trainable parameter, nothing shared out: 16 to 20 with AdamW."""
        return 4 + self.copy + GRADIENTS[self.gradients] + MOMENTS[self.optimizer]


RECIPES = tuple(
    Recipe(precision, optimizer, gradients)
    for precision in ("fp32", "bf16", "fp16")
    for optimizer in MOMENTS
    for gradients in GRADIENTS
    if gradients == "fp32" or (optimizer == "AdamW" and precision != "fp32")
)


@dataclass(frozen=True)
class Layer:
    """Some of a model's parameters: how many numbers."""

    name: str
    whole: int
    """Without padding, over all tp ranks, shared ones once."""
    local: int
    """On this tp rank, with padding and with copies."""
    rows: int
    """Of these, on the replica that has most, where replicas share them out."""
    trainable: int
    """Of local; the others have neither gradient nor moments."""
    trainable_rows: int


@dataclass(frozen=True)
class Accounting:
    """The parameters of one rank, and what they take by recipe and dp_mode."""

    layers: tuple[Layer, ...]
    shards: int

    def bytes(self, recipe: Recipe, dp_mode: DataParallel = "replicate", pp: int = 1) -> int:
        """Of a rank, when most of it is there; of fsdp without the blocks that are gathered just then."""
        layout = ParallelConfig(pp=pp, dp_mode=dp_mode, precision=recipe.precision)
        each = state_bytes(layout, self.shards)
        shares = self.shards if each.weights < 4 else 1
        local, rows = (sum(getattr(x, name) for x in self.layers) for name in ("local", "rows"))
        trained, trained_rows = (sum(getattr(x, f"trainable{end}") for x in self.layers) for end in ("", "_rows"))
        held, updated = (rows, trained_rows) if shares > 1 else (local, trained)
        return 4 * held + int(each.copy) * local + (recipe.bytes - 4 - recipe.copy) * updated

    def __str__(self) -> str:
        return f"{_layer_table(self)}\n\n{_recipe_table(self)}"


def accounting(
    model: ModelConfig | nn.Module, parallel: ParallelConfig = ParallelConfig(), *, shards: int = 1, pp_rank: int = 0
) -> Accounting:
    """The parameters of one rank: of a config what the layout gives it, of a module what it has on this process.

    A module's are listed by child, of lists of modules by each; what layers know of their placements is used.
    shards: replicas that share them out. Raises ValueError for a layout that cannot split the config, or for a module
    that `placements` refuses.
    """
    if isinstance(model, nn.Module):
        return Accounting(tuple(_of_module(model, shards)), shards)
    check_tp(model, parallel.tp)
    part = part_of(pp_rank, stage_parts(model, parallel, model.max_seq_len), parallel)
    here, alone = _of_config(model, part, parallel.tp), _of_config(model, part, 1)
    whole = {name: tuple(_unpadded(one, model) for one in group) for name, group in alone.items()}
    return Accounting(tuple(_layer(name, here[name], whole[name], shards) for name in here), shards)


def _of_config(model: ModelConfig, part: Part, tp: int) -> dict[str, tuple[Weight, ...]]:
    """The parameters of each block and of the ends, there by what has them."""
    found = {f"block {layer}": block_weights(model, tp) for layer in part.layers}
    for one in end_weights(model, tp, part.first, part.last):
        name = "norm" if one.name.startswith("norm.") else one.name
        found[name] = (*found.get(name, ()), one)
    return found


def _layer(name: str, local: tuple[Weight, ...], whole: tuple[Weight, ...], shards: int) -> Layer:
    here, rows = (sum(one.numbers(n) for one in local) for n in (1, shards))
    return Layer(name, sum(one.numbers() for one in whole), here, rows, here, rows)


def _unpadded(weight: Weight, model: ModelConfig) -> Weight:
    return weight._replace(rows=model.vocab_size) if weight.name in ("embedding.weight", "head.weight") else weight


def _of_module(module: nn.Module, shards: int) -> Iterator[Layer]:
    """Its parameters, each once, by the child that has them first."""
    known = placements(module, mesh_of(module))
    found: dict[str, Layer] = {}
    for name, parameter in module.named_parameters():
        local = local_part(parameter.detach())
        shared = local is not parameter.detach() and local.shape != parameter.shape  # FSDP has shared it out already
        whole = parameter.numel()
        rows = local.numel() if shared else -(-len(local) // shards) * prod(local.shape[1:]) if local.dim() else 1
        trains = parameter.requires_grad
        group = _group(module, name)
        before = found.get(group, Layer(group, 0, 0, 0, 0, 0))
        found[group] = replace(
            before,
            whole=before.whole + prod(known[name].shape),
            local=before.local + whole,
            rows=before.rows + rows,
            trainable=before.trainable + whole * trains,
            trainable_rows=before.trainable_rows + rows * trains,
        )
    yield from found.values()


def _group(module: nn.Module, name: str) -> str:
    """The child that a parameter belongs to; of a list or a dict of modules its entry."""
    path = name.split(".")
    depth, here = 1, module
    while depth < len(path) and isinstance(here := here.get_submodule(path[depth - 1]), nn.ModuleList | nn.ModuleDict):
        depth += 1
    return ".".join(path[:depth])


def _layer_table(found: Accounting) -> str:
    """A line a layer; neighbours that differ by their number only share one."""
    shown: list[tuple[str, Layer]] = []
    for one in found.layers:
        if shown and replace(shown[-1][1], name="") == replace(one, name="") and one.name[-1].isdigit():
            shown[-1] = f"{shown[-1][0].split(' to ')[0]} to {one.name.split()[-1]}", one
        else:
            shown.append((one.name, one))
    width = max(19, *(len(name) for name, _ in shown))
    lines = [f"{'parameters, of each':{width}}{'whole':>17}{'on this rank':>17}{'trainable':>17}"]
    lines += [f"{name:{width}}{one.whole:17,}{one.local:17,}{one.trainable:17,}" for name, one in shown]
    sums = (sum(getattr(one, name) for one in found.layers) for name in ("whole", "local", "trainable"))
    return "\n".join([*lines, f"{'all together':{width}}" + "".join(f"{number:17,}" for number in sums)])


def _recipe_table(found: Accounting) -> str:
    """A line a recipe: bytes of a parameter, and MiB of the rank."""
    modes: tuple[DataParallel, ...] = ("replicate", "zero2", "fsdp") if found.shards > 1 else ("replicate",)
    heads = "".join(f"{mode if mode == 'replicate' else f'{mode} / {found.shards}':>14}" for mode in modes)
    lines = [
        "bytes of a trainable parameter, and MiB on this rank (fsdp: without the blocks that are gathered just then)",
        f"{'precision':10}{'optimizer':13}{'gradients':11}{'':11}{'weights':>8}{'copy':>6}{'gradients':>11}{'moments':>9}"
        f"{'bytes':>7}{heads}",
    ]
    for one in RECIPES:
        whose = "tpformer" if one.ours else "to compare"
        numbers = "".join(f"{found.bytes(one, mode) / 2**20:14.1f}" for mode in modes)
        gradients, moments = GRADIENTS[one.gradients], MOMENTS[one.optimizer]
        lines.append(
            f"{one.precision:10}{one.optimizer:13}{one.gradients:11}{whose:11}{4:8}{one.copy:6}{gradients:11}{moments:9}"
            f"{one.bytes:7}{numbers}"
        )
    return "\n".join(lines)
