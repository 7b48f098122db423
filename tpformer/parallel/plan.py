"""Reading a plan of `tpformer.parallelize`: which layer becomes what, and everything that is wrong with it at once."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from torch import nn

from tpformer.layers.embedding import padded_vocab

Style = Literal["column", "row", "vocab", "partial", "copy"]
Problems = defaultdict[str, list[str]]
"""What is wrong -> the layers of which it is true: a model has many layers alike."""

_TYPES: dict[Style, tuple[type[nn.Module], ...]] = {
    "column": (nn.Linear,),
    "row": (nn.Linear,),
    "vocab": (nn.Linear, nn.Embedding),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Choice:
    """A module of the model, by all names that it has there, and what the plan says of it."""

    module: Any
    names: tuple[str, ...]
    pattern: str
    style: Style

    @property
    def path(self) -> tuple[str, ...]:
        """The parts of its first name."""
        return tuple(self.names[0].split("."))

    def __str__(self) -> str:
        return f"{self.style} {self.pattern!r}"


@dataclass
class Group:
    """Columns and the rows that take what they give: all that are nearest to each other, below one module."""

    path: tuple[str, ...]
    columns: list[Choice]
    rows: list[Choice]


def read_plan(module: nn.Module, plan: Mapping[str, Style], tp: int) -> list[Choice]:
    """The chosen modules of a model, each once.

    Raises ValueError naming everything that is wrong, the first layer of each kind, and how many more there are.
    """
    problems: Problems = defaultdict(list)
    choices = _choices(module, plan, problems)
    _check_ties(module, choices, problems)
    for choice in choices:
        for rule in _rules(choice, module, tp):
            problems[f"{rule} ({choice})"].append(choice.names[0])
    fit = [choice for choice in choices if type(choice.module) in _TYPES.get(choice.style, ())]
    for group in _groups(fit, problems):
        _check_widths(group, problems)
        _check_between(group, module, choices, problems)
    if problems:
        raise ValueError("the plan does not fit the module: " + "; ".join(_lines(problems)))
    return choices


def _lines(problems: Problems) -> Iterator[str]:
    for rule, names in problems.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{names[0]}{more}: {rule}" if names[0] else rule


def _choices(module: nn.Module, plan: Mapping[str, Style], problems: Problems) -> list[Choice]:
    """What the patterns match; a module that two styles claim has the first."""
    names: defaultdict[nn.Module, list[str]] = defaultdict(list)
    for name, child in module.named_modules(remove_duplicate=False):
        if name:
            names[child].append(name)
    if not plan:
        problems["the plan is empty"].append("")
    found: dict[nn.Module, Choice] = {}
    for pattern, style in plan.items():
        if style not in get_args(Style):
            problems[f"style {style!r} of {pattern!r} must be one of {', '.join(get_args(Style))}"].append("")
            continue
        matched = [child for child in names if any(fnmatchcase(name, pattern) for name in names[child])]
        if not matched:
            problems[f"pattern {pattern!r} ({style}) matches no module"].append("")
        for child in matched:
            choice = Choice(child, tuple(names[child]), pattern, style)
            first = found.setdefault(child, choice)
            if first.style != style:
                problems[f"is {first} and {choice}"].append(choice.names[0])
    return list(found.values())


def _check_ties(module: nn.Module, choices: list[Choice], problems: Problems) -> None:
    """A weight that several layers share can only be split in one way."""
    styles = {name: choice.style for choice in choices for name in choice.names}
    owners: defaultdict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners[parameter].append(name)
    for shared in owners.values():
        found = {styles.get(name.rpartition(".")[0], "copy") for name in shared}
        if len(found) > 1:
            also = ", ".join(shared[1:])
            problems[f"is also {also}, so that the styles must be the same, not {_and(found)}"].append(shared[0])


def _rules(choice: Choice, module: nn.Module, tp: int) -> Iterator[str]:
    """What the layer breaks by itself."""
    kinds = _TYPES.get(choice.style)
    if kinds is None:
        own = list(choice.module.named_parameters(recurse=False))
        if not own or "placements" in vars(choice.module):
            has = "placements" if own else "no parameters"
            yield f"is a {type(choice.module).__name__}, which has {has} of its own"
    elif type(choice.module) not in kinds:  # a subclass may compute something else, or keep something beside
        yield f"is a {type(choice.module).__name__}, not an {' or '.join(f'nn.{kind.__name__}' for kind in kinds)}"
    else:
        yield from _state_rules(choice.module)
        yield from _size_rules(choice, module.get_submodule(".".join(choice.path[:-1])), tp)


def _state_rules(module: nn.Module) -> Iterator[str]:
    """What would be lost, or become wrong, with the layer."""
    if any(getattr(module, hooks) for hooks in _HOOKS):
        yield "has hooks, which would see one rank's part: remove them first, and put them on what replaces it"
    for name, parameter in module.named_parameters():
        if type(parameter) is not nn.Parameter:
            yield f"{name} is a {type(parameter).__name__}, not an nn.Parameter"
        if parameter.grad is not None or parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            yield f"{name} has a gradient or hooks, which would be lost: clear them first"
    for option in ("max_norm", "scale_grad_by_freq", "sparse") if isinstance(module, nn.Embedding) else ():
        if getattr(module, option):
            yield f"{option} ({getattr(module, option)}) cannot be split"


def _size_rules(choice: Choice, parent: Any, tp: int) -> Iterator[str]:
    """What tp does not divide. Attention modules that say how wide a head is are not to have a part of one."""
    layer = choice.module
    if choice.style == "vocab":
        try:
            padded_vocab(layer.weight.shape[0], tp)
        except ValueError as error:
            yield str(error)
        return
    side = "out_features" if choice.style == "column" else "in_features"
    width = getattr(layer, side)
    head_dim = getattr(parent, "head_dim", None) or getattr(parent, "attention_head_size", None)
    if isinstance(head_dim, int) and width % head_dim == 0 and width // head_dim % tp:
        yield f"{side} ({width}), {width // head_dim} heads of {head_dim}: tp ({tp}) must divide the heads"
    elif width % tp:
        yield f"{side} ({width}) must be divisible by tp ({tp})"


def _groups(choices: list[Choice], problems: Problems) -> list[Group]:
    """Each column with its rows: they meet in the lowest module that has both, seen from either of them."""
    groups: dict[tuple[str, ...], Group] = {}
    for style, other in (("column", "row"), ("row", "column")):
        others = [choice for choice in choices if choice.style == other]
        around = {path for choice in others for path in _ancestors(choice)}
        for choice in (choice for choice in choices if choice.style == style):
            path = next((path for path in _ancestors(choice) if path in around), ())
            group = groups.setdefault(path, Group(path, [], []))
            (group.columns if style == "column" else group.rows).append(choice)
    rows, columns = (_and({str(choice) for choice in choices if choice.style == style}) for style in ("row", "column"))
    where = "beside it or in the nearest module around it"
    for group in groups.values():
        for column in group.columns if not group.rows else ():
            rule = f"{column} needs a row that takes its output, {where}, not {rows or 'none'}"
            problems[f"{rule}; a vocab gives a whole output"].append(column.names[0])
        for row in group.rows if not group.columns else ():
            rule = f"{row} needs a column that gives its input, {where}, not {columns or 'none'}"
            problems[rule].append(row.names[0])
    return [group for group in groups.values() if group.columns and group.rows]


def _ancestors(choice: Choice) -> list[tuple[str, ...]]:
    """The paths of the modules around it, the nearest first, the whole model last."""
    return [choice.path[:length] for length in range(len(choice.path) - 1, -1, -1)]


def _check_widths(group: Group, problems: Problems) -> None:
    """Each row takes what a column gives; keys and values may be narrower than queries, by a whole factor."""
    given = {column.module.out_features: column for column in group.columns}
    taken = {row.module.in_features: row for row in group.rows}
    for width, row in taken.items():
        if width not in given:
            found = _and(f"{column} {size}" for size, column in given.items())
            problems[f"{row} takes in_features ({width}), which no column beside it gives ({found})"].append(
                row.names[0]
            )
    for width, column in given.items():
        if all(size % width for size in taken):
            found = _and(f"{row} {size}" for size, row in taken.items())
            problems[
                f"{column} gives out_features ({width}), which must be a row's in_features or divide them ({found}): "
                "several outputs in one weight cannot be split, as each rank would take them for others"
            ].append(column.names[0])


def _check_between(group: Group, module: nn.Module, choices: list[Choice], problems: Problems) -> None:
    """A copy that is used between a column and its row has a part of its gradient on each rank: the plan must say.

    What is as wide as the model cannot be used there, since each rank has fewer features.
    """
    chosen = {choice.module for choice in choices}
    widths = {column.module.in_features for column in group.columns}
    widths |= {row.module.out_features for row in group.rows}
    for name, child in module.get_submodule(".".join(group.path)).named_modules():
        own = list(child.parameters(recurse=False))
        if child not in chosen and own and not any(p.shape and p.shape[-1] in widths for p in own):
            shapes = _and(str(tuple(p.shape)) for p in own)
            problems[
                f"has parameters {shapes} and is not in the plan, but beside {group.columns[0]} and {group.rows[0]}: "
                "is it used between them (partial: its gradients are summed over tp) or not (copy)?"
            ].append(".".join((*group.path, *filter(None, [name]))))


def _and(texts: Iterable[str]) -> str:
    return ", ".join(sorted(texts))
