"""What training any module would send: its replicas' gradients, its outputs, and its parallel layers' collectives.

Counted from its parameters and from one forward on the meta device, which computes nothing.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tpformer.parallel_config import ParallelConfig
from tpformer.planner import dp_traffic
from tpformer.planner.layer_traffic import PARALLEL, check_meshes, layer_calls, local_numel, partial_numbers
from tpformer.planner.message import Traffic
from tpformer.planner.step_traffic import LayerTraffic, StepTraffic


def module_traffic(
    module: nn.Module,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    layout: ParallelConfig = ParallelConfig(),
    *,
    micro_batches: int = 1,
    depth: int = 1,
    gradient_dtype: torch.dtype | None = torch.float32,
) -> StepTraffic:
    """Of a step in which each replica runs forward and backward of so many micro-batches like `inputs`.

    module: on one process, `Mesh()`; for sequence parallelism on `Mesh(sequence_parallel=True)`; it stays as it is.
    inputs: example arguments of its forward, by position or by name. layout: its tp, dp and sequence_parallel are read.
    depth: down to which its children are the layers, neighbours alike together; their outputs are the whole ones.
    gradient_dtype: what replicas sum; None: that of the parameters. Of tensor parallelism it counts tpformer's layers,
    but no function called by itself, as a loss.
    Raises ValueError for a module that cannot run on the meta device, one already split, and other layouts.
    """
    _check(layout, micro_batches, depth)
    check_meshes(module, layout)
    outputs, sends = _run(module, inputs, layout, micro_batches)
    step = list(_grouped([each for calls in sends.values() for each in calls]))
    if numbers := partial_numbers(module, layout):
        factors, what = (("numbers", numbers), ("bytes", 4)), "partial gradients of copies"
        step.append(Traffic("all_reduce", "tp", "float32", "forward", what, False, factors, (("steps", 1),)))
    if (layout.dp or 1) > 1:
        step += _buckets(module, layout.tp, gradient_dtype)
    rows = _rows(module, depth, layout.tp, gradient_dtype)
    for name, calls in sends.items():
        rows[_nearest(name, rows)].sends += calls
    layers = [
        LayerTraffic(name or "(its own)", 1, row.parameters, row.gradients, outputs.get(name, 0), _grouped(row.sends))
        for name, row in rows.items()
    ]
    present = [each for each in layers if each.parameters or each.output_bytes or each.sends]
    return StepTraffic(tuple(_together(present)), tuple(step), {"tp": layout.tp, "dp": layout.dp or 1})


def _check(layout: ParallelConfig, micro_batches: int, depth: int) -> None:
    for name, number in (("micro_batches", micro_batches), ("depth", depth)):
        if number < 1:
            raise ValueError(f"{name} ({number}) must be at least 1")
    if layout.pp > 1 or layout.dp_mode != "replicate":
        raise ValueError(
            f"pp ({layout.pp}) must be 1 and dp_mode ({layout.dp_mode}) replicate: a module has no stages, and how it "
            "would be shared out is not known"
        )


@dataclass
class _Row:
    parameters: int = 0
    gradients: int = 0
    sends: list[Traffic] = field(default_factory=list)


def _rows(module: nn.Module, depth: int, tp: int, dtype: torch.dtype | None) -> dict[str, _Row]:
    """Parameters, and bytes of their gradients, of the modules down to this depth; shared ones at the first."""
    rows = {name: _Row() for name, _ in module.named_modules() if (name.count(".") + 1 if name else 0) <= depth}
    for name, parameter in module.named_parameters():
        row, size = rows[_nearest(name.rpartition(".")[0], rows)], local_numel(module, name, tp)
        row.parameters += size
        row.gradients += parameter.requires_grad * size * (dtype or parameter.dtype).itemsize
    return rows


def _nearest(path: str, rows: Mapping[str, _Row]) -> str:
    """The row of a module, or of the nearest one around it."""
    while path not in rows:
        path = path.rpartition(".")[0]
    return path


def _run(
    module: nn.Module, inputs: Any, layout: ParallelConfig, micro_batches: int
) -> tuple[dict[str, int], dict[str, list[Traffic]]]:
    """Bytes of the last output of every submodule, and what each parallel layer sends, by name."""
    outputs: dict[str, int] = {}
    sends: defaultdict[str, list[Traffic]] = defaultdict(list)

    def look(name: str, layer: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        outputs[name] = sum(x.numel() * x.element_size() for x in tree_leaves(output) if isinstance(x, Tensor))
        if layout.tp > 1 and isinstance(layer, PARALLEL):
            sends[name] += layer_calls(layer, given[0], output, layout, micro_batches)

    def hook(name: str) -> Any:
        return lambda layer, args, kwargs, output: look(name, layer, (*args, *kwargs.values()), output)

    whole: Any = inputs if isinstance(inputs, tuple | Mapping) else (inputs,)
    whole = tree_map_only(Tensor, lambda x: x.detach().to("meta").requires_grad_(x.requires_grad), whole)
    args, kwargs = ((), dict(whole)) if isinstance(whole, Mapping) else (whole, {})
    state: dict[str, Tensor] = {name: torch.empty_like(b, device="meta") for name, b in module.named_buffers()}
    for name, p in module.named_parameters():
        state[name] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    with ExitStack() as stack:
        for name, layer in module.named_modules():
            if name:
                stack.callback(layer.register_forward_hook(hook(name), with_kwargs=True).remove)
        try:
            with torch.device("meta"), torch.enable_grad():
                torch.func.functional_call(module, state, args, kwargs)
        except Exception as error:
            raise ValueError(
                f"{type(module).__name__} cannot run on the meta device, on which its outputs are counted: "
                f"{type(error).__name__}: {error}"
            ) from error
    return outputs, dict(sends)


def _buckets(module: nn.Module, tp: int, dtype: torch.dtype | None) -> list[Traffic]:
    """Gradients as `parallel.data` would group them: buckets of one dtype each, the last one after backward."""
    groups: list[tuple[torch.dtype, list[int]]] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            if not groups or groups[-1][0] != parameter.dtype:
                groups.append((parameter.dtype, []))
            groups[-1][1].append(local_numel(module, name, tp))
    kinds: Counter[tuple[int, torch.dtype, bool]] = Counter()
    for number, (own, sizes) in reversed(list(enumerate(groups))):
        cut = dp_traffic.bucket_sizes((tuple(sizes), (), ()), 0, dp_traffic.BUCKET_BYTES)
        for place, size in enumerate(cut):
            kinds[size, dtype or own, number > 0 or place < len(cut) - 1] += 1
    return [
        Traffic(
            op="all_reduce",
            axis="dp",
            dtype=str(kind).removeprefix("torch."),
            phase="backward",
            what="gradient bucket",
            hidden=hidden,
            factors=(("numbers", size), ("bytes", kind.itemsize)),
            call_factors=(("buckets", number),),
        )
        for (size, kind, hidden), number in kinds.items()
    ]


def _grouped(calls: Sequence[Traffic]) -> tuple[Traffic, ...]:
    """Equal ones together, each `call_factors` with how many there are."""
    counted = Counter(calls)
    return tuple(
        each if number == 1 else replace(each, call_factors=(*each.call_factors, ("uses", number)))
        for each, number in counted.items()
    )


def _together(layers: list[LayerTraffic]) -> Iterator[LayerTraffic]:
    """Neighbours that differ by name only as one: "blocks.0 to blocks.3"."""
    group: list[LayerTraffic] = []
    for layer in [*layers, None]:
        if group and (layer is None or replace(layer, name=group[0].name) != group[0]):
            names = group[0].name if len(group) == 1 else f"{group[0].name} to {group[-1].name}"
            yield replace(group[0], name=names, alike=len(group))
            group = []
        if layer is not None:
            group.append(layer)
