"""What each of tpformer's parallel layers sends, of a module that is on one process, were it split over tp."""

from math import prod
from typing import Any

from torch import Tensor, nn

from tpformer.layers.attention import SelfAttention
from tpformer.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from tpformer.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpformer.mesh import Mesh, divide
from tpformer.parallel_config import ParallelConfig
from tpformer.placement import placements
from tpformer.planner.message import Factors, Traffic

PARALLEL = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, VocabParallelHead)


def check_meshes(module: nn.Module, layout: ParallelConfig) -> None:
    """Raises ValueError if a layer is split already, or does not know of sequence parallelism as the layout does."""
    for name, layer in module.named_modules():
        mesh = getattr(layer, "mesh", None)
        if not isinstance(mesh, Mesh):
            continue
        if mesh.tp.size > 1:
            raise ValueError(f"{name or 'the module'} is split over tp ({mesh.tp.size}): give one made on Mesh()")
        if layout.tp > 1 and mesh.sequence_parallel != layout.sequence_parallel:
            raise ValueError(
                f"{name or 'the module'} was made on Mesh(sequence_parallel={mesh.sequence_parallel}), but the layout "
                f"has sequence_parallel={layout.sequence_parallel}"
            )


def layer_calls(layer: nn.Module, x: Tensor, y: Any, layout: ParallelConfig, micro_batches: int) -> list[Traffic]:
    """Of a use of one of PARALLEL on the whole x; of the output y, only whether it has a gradient matters.

    Raises ValueError for a sequence that tp does not divide.
    """
    learns = [t for t in (y if isinstance(y, tuple) else (y,)) if t.requires_grad]
    weight: Tensor = layer.weight  # type: ignore[assignment]
    dtype = weight.dtype if isinstance(layer, VocabParallelEmbedding) else x.dtype
    found: list[tuple[str, str, str, bool, tuple[int, ...]]] = []
    if isinstance(layer, ColumnParallelLinear | VocabParallelHead):
        found += _entered(tuple(x.shape), x.requires_grad, weight.requires_grad, layout)
        if isinstance(layer, ColumnParallelLinear) and layer.gather_output:
            found.append(("all_gather", "forward", "gathered output", False, (*x.shape[:-1], len(weight))))
    else:
        width = weight.shape[1] if isinstance(layer, VocabParallelEmbedding) else weight.shape[0]
        rows = x.shape if isinstance(layer, VocabParallelEmbedding) else x.shape[:-1]
        found += _left((*rows, width), bool(learns), layout)
        if isinstance(layer, RowParallelLinear) and not layer.input_is_parallel and x.requires_grad:
            found.append(("all_gather", "backward", "gradient of a split input", False, tuple(x.shape)))
    name, calls = str(dtype).removeprefix("torch."), (("micro-batches", micro_batches),)
    return [
        Traffic(op, "tp", name, phase, what, hidden, _bytes(shape, dtype.itemsize), calls)
        for op, phase, what, hidden, shape in found
    ]


def _entered(shape: tuple[int, ...], dx: bool, dweight: bool, layout: ParallelConfig) -> list[Any]:
    """The door into a region, for x of this whole shape."""
    summed, what = "gradient of a region's input", "input of a region"
    if not layout.sequence_parallel:
        return [("all_reduce", "backward", summed, True, shape)] * dx
    divide(shape[-2], layout.tp, "sequence length")
    found: list[Any] = [("all_gather", "forward", what, False, shape)]
    found += [("all_gather", "backward", "input again, for weights' gradients", True, shape)] * dweight
    return found + [("reduce_scatter", "backward", summed, True, shape)] * dx


def _left(shape: tuple[int, ...], learns: bool, layout: ParallelConfig) -> list[Any]:
    """The door out of it, for a sum of this whole shape."""
    if not layout.sequence_parallel:
        return [("all_reduce", "forward", "sum of a region", False, shape)]
    divide(shape[-2], layout.tp, "sequence length")
    found: list[Any] = [("reduce_scatter", "forward", "sum of a region", False, shape)]
    return found + [("all_gather", "backward", "gradient of a region's output", False, shape)] * learns


def _bytes(shape: tuple[int, ...], width: int) -> Factors:
    *batch, s, d = shape
    return ("b", prod(batch)), ("s", s), ("d", d), ("bytes", width)


def local_numel(module: nn.Module, name: str, tp: int) -> int:
    """Numbers of a parameter that one of tp ranks would have. Raises ValueError for a width that tp does not divide."""
    parameter, (path, _, leaf) = module.get_parameter(name), name.rpartition(".")
    owner = module.get_submodule(path)
    if tp == 1 or not isinstance(owner, PARALLEL) or (isinstance(owner, RowParallelLinear) and leaf == "bias"):
        return parameter.numel()
    around = module.get_submodule(path.rpartition(".")[0]) if path else owner
    if isinstance(around, SelfAttention) and owner is around.qkv and around.config.num_kv_heads < tp:
        c = around.config
        return (divide(c.num_heads, tp, "num_heads") + 2) * c.head_dim * prod(parameter.shape[1:])
    dim = 1 if isinstance(owner, RowParallelLinear) else 0
    return divide(parameter.shape[dim], tp, f"dim {dim} of {name}") * parameter.numel() // parameter.shape[dim]


def partial_numbers(module: nn.Module, layout: ParallelConfig) -> int:
    """Numbers that the ranks of tp sum once a step: gradients of copies, each of which has a part only."""
    if layout.tp == 1:
        return 0
    mesh = Mesh(sequence_parallel=layout.sequence_parallel)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    found = sum(prod(p.shape) for name, p in placements(module, mesh).items() if p.partial and name in trained)
    for layer in module.modules():
        if isinstance(layer, SelfAttention) and layer.config.num_kv_heads < layout.tp:
            c = layer.config
            for parameter in layer.qkv.parameters():
                found += parameter.requires_grad * 2 * c.num_kv_heads * c.head_dim * prod(parameter.shape[1:])
    return found
