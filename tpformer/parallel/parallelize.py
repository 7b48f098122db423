"""Bring your own model: chosen layers of an existing module become tensor-parallel, in place."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tpformer.collectives import gather_stack, raise_together
from tpformer.layers.embedding import padded_vocab
from tpformer.mesh import Mesh
from tpformer.parallel.plan import Choice, Style, read_plan
from tpformer.parallel.replacements import ColumnLinear, Enter, RowLinear, VocabEmbedding, VocabLinear
from tpformer.placement import Placement, load_full, replicated, split

Model = TypeVar("Model", bound=nn.Module)
Undo = list[Callable[[], Any]]
"""What takes back the changes, in the order in which they were made."""


def parallelize(
    module: Model, plan: Mapping[str, Style], mesh: Mesh, *, check: Callable[[Model], Tensor] | None = None
) -> Model:
    """Split the layers of a module that a plan names over tp, keeping their weights; returns the same module.

    plan: a pattern of dotted names (as the shell's: `*` stands for anything, dots too) -> a style.
      column   nn.Linear by its outputs: what follows sees out_features/tp, as far as the row that takes it
      row      nn.Linear by its inputs, summed over tp: it must be beside its columns, or in the nearest module around
      vocab    nn.Embedding or nn.Linear by its vocabulary, padded to a multiple of 128; the output is whole
      partial  a copy that is used between a column and its row (a norm over each head): its gradients are to be
               summed, by `reduce_partial_gradients`
      copy     a copy that is used elsewhere; only where it could be either is it to be said
    All else stays a copy on every rank, with whole gradients. Names and global shapes of parameters stay; shared
    weights stay shared. Every rank of tp must hold the same weights, call with the same inputs and torch seed, and make
    its optimizer afterwards; meta tensors stay so. Dropout between a column and its row has other masks than before.
    A module whose forward counts heads by an attribute needs that divided by tp; -1 in its views needs nothing.
    check: something whole that is computed from the module, without dropout, say its logits for some tokens. It is
    computed before and after, and must agree, or the module is put back: no look at the layers can tell what a
    forward does between them.
    Raises ValueError under sequence parallelism; with everything that is wrong with the plan; if ranks hold different
    weights; if the check fails. The module is then as it was.
    """
    if mesh.sequence_parallel:
        raise ValueError("sequence_parallel must be False: what is not in the plan would see a part of the sequence")
    choices = read_plan(module, plan, mesh.tp.size)
    _check_same_weights(module, mesh)
    with torch.no_grad():
        before = check(module) if check else None
    undo = _replace(module, choices, mesh)
    if check and before is not None:
        try:
            raise_together(_difference(before, module, check), mesh.tp)
        except ValueError:
            for change in reversed(undo):
                change()
            raise
    return module


def _check_same_weights(module: nn.Module, mesh: Mesh) -> None:
    """Parts of different models would make none: compare a sum of each parameter; collective.

    Raises ValueError naming the first that differs, on every rank.
    """
    named = [(name, p) for name, p in module.named_parameters() if not p.is_meta]
    for axis in (mesh.tp, mesh.dp) if named else ():
        sums = torch.stack([p.detach().sum(dtype=torch.float64).to(mesh.device) for _, p in named])
        bits = gather_stack(sums, axis).view(torch.int64)  # NaN equals itself
        differ = (bits != bits[0]).any(0).tolist()
        if any(differ):
            raise ValueError(
                f"{named[differ.index(True)][0]} differs between ranks of {axis.name}, as do {sum(differ) - 1} more of "
                f"{len(named)} parameters: every rank must hold the same weights; seed torch before making the module"
            )


def _replace(module: nn.Module, choices: list[Choice], mesh: Mesh) -> Undo:
    """Put parallel layers in the place of the chosen ones."""
    undo: Undo = []
    entries = _entries(module, choices, mesh, undo)
    made: dict[nn.Parameter, nn.Parameter] = {}  # what was shared is shared
    for choice in choices:
        if choice.style == "copy":
            continue
        if choice.style == "partial":
            own = choice.module.named_parameters(recurse=False)
            choice.module.placements = {name: replicated(tuple(p.shape), mesh.tp, partial=True) for name, p in own}
            undo.append(partial(delattr, choice.module, "placements"))
            continue
        new = _moved(choice, _new_layer(choice, mesh, entries), mesh, made)
        for name in choice.names:
            parent, _, attribute = name.rpartition(".")
            owner = module.get_submodule(parent)
            undo.append(partial(setattr, owner, attribute, choice.module))
            setattr(owner, attribute, new)
    return undo


def _entries(module: nn.Module, choices: list[Choice], mesh: Mesh, undo: Undo) -> dict[nn.Module, Enter]:
    """How each column takes its input: one door for those of a module that may read the same tensor."""
    siblings: defaultdict[tuple[nn.Module, int], list[nn.Module]] = defaultdict(list)
    for choice in choices:
        if choice.style == "column":
            parent = module.get_submodule(".".join(choice.path[:-1]))
            siblings[parent, choice.module.in_features].append(choice.module)
    entries: dict[nn.Module, Enter] = {}
    for (parent, _), columns in siblings.items():
        enter = Enter(mesh)
        entries.update(dict.fromkeys(columns, enter))
        undo.append(parent.register_forward_hook(enter.forget, always_call=True).remove)
    return entries


def _new_layer(choice: Choice, mesh: Mesh, entries: dict[nn.Module, Enter]) -> Any:
    """The layer that takes its place, without weights."""
    old = choice.module
    if choice.style == "column":
        return ColumnLinear(old.in_features, old.out_features, mesh, entries[old])
    if choice.style == "row":
        return RowLinear(old.in_features, old.out_features, mesh)
    if isinstance(old, nn.Linear):
        return VocabLinear(old.in_features, old.out_features, mesh)
    return VocabEmbedding(old.num_embeddings, old.embedding_dim, old.padding_idx, mesh)


def _moved(choice: Choice, new: Any, mesh: Mesh, made: dict[nn.Parameter, nn.Parameter]) -> Any:
    """The new layer with this rank's part of the old one's parameters."""
    dim = 1 if choice.style == "row" else 0
    total = choice.module.weight.shape[dim]
    local = (padded_vocab(total, mesh.tp.size) if choice.style == "vocab" else total) // mesh.tp.size
    new.placements = {}
    for name, old in choice.module._parameters.items():
        if old is None:
            new.register_parameter(name, None)
            continue
        shape = tuple(old.shape)
        whole = dim >= len(shape)  # a row's bias
        new.placements[name] = replicated(shape, mesh.tp) if whole else split(shape, dim, mesh.tp, local)
        if old not in made:
            made[old] = old if whole else _part(old, new.placements[name], local)
        new.register_parameter(name, made[old])
    return new.train(choice.module.training)


def _part(whole: nn.Parameter, placement: Placement, size: int) -> nn.Parameter:
    """This rank's slice, `size` long with its padding."""
    shape = (*whole.shape[: placement.dim], size, *whole.shape[placement.dim + 1 :])
    local = whole.detach().new_empty(shape)
    load_full(local, placement, whole.detach())
    return nn.Parameter(local, requires_grad=whole.requires_grad)


@torch.no_grad()
def _difference(before: Tensor, module: Model, check: Callable[[Model], Tensor]) -> ValueError | None:
    """What is wrong with what the split module computes."""
    try:
        after = check(module)
    except Exception as error:  # whatever the forward raises where it meets a part
        return ValueError(f"the check fails on the split module: {error}")
    if after.shape != before.shape:
        return ValueError(f"the check gives shape {tuple(after.shape)} after, {tuple(before.shape)} before the split")
    distance = ((after - before).abs().max() / before.abs().max()).item()
    tolerance = torch.finfo(before.dtype).eps ** 0.5  # rounding is far below, wrong features are far above
    if distance <= tolerance:
        return None
    return ValueError(
        f"the check differs by {distance:.1e} of its largest number after the split, more than {tolerance:.1e}: "
        "between a column and its row something mixes features, or counts them by an attribute (or drops some out)"
    )
