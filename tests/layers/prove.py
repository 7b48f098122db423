"""How the tests of every layer compare it with a reference.

`prove` runs a function at tp 1, 2 and 4, with and without sequence parallelism, in fp64 and fp32: outputs, input
gradients and the whole gradient of every parameter must be those of the reference, on every rank.
"""

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed import Ranks
from tpformer import (
    Mesh,
    full_gradient,
    load_full_state,
    placements,
    reduce_partial_gradients,
)
from tpformer_kernels import Backend
from tpformer_kernels.jit import INTERPRETED

Arrays = dict[str, npt.NDArray[Any]]
Results = dict[str, Arrays]  # of each layout and dtype
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
DTYPES: dict[Backend, list[str]] = {"torch": ["float64", "float32"], "triton": ["float32"]}
interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton runs CPU tensors in its interpreter only")
BACKENDS = ["torch", pytest.param("triton", marks=interpreted)]


def noise(name: str, *shape: int) -> Tensor:
    """Random fp64 numbers that depend on the name and shape only."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def meshes() -> dict[str, Mesh]:
    """Every layout that the running processes allow: tp 1 on one, tp 2 and 4 on four."""
    found: dict[str, Mesh] = {}
    for tp in (2, 4) if dist.is_initialized() else (1,):
        mesh = Mesh.create(tp=tp)
        found |= {f"tp {tp}": mesh, f"tp {tp} sequence-parallel": replace(mesh, sequence_parallel=True)}
    return found


def take(x: Tensor, kind: str, mesh: Mesh) -> Tensor:
    """This rank's part of a whole tensor: "tokens" under sequence parallelism, "features" always, or the "whole"."""
    if kind == "whole" or (kind == "tokens" and not mesh.sequence_parallel):
        return x
    return x.chunk(mesh.tp.size, dim=-1 if kind == "features" else -2)[mesh.tp.rank]


def whole(x: Tensor, kind: str, mesh: Mesh) -> Tensor:
    """The inverse of `take`, by torch's own all-gather."""
    if mesh.tp.size == 1 or kind == "whole" or (kind == "tokens" and not mesh.sequence_parallel):
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(mesh.tp.size)]
    dist.all_gather(parts, x.contiguous(), group=mesh.tp.group)
    return torch.cat(parts, dim=-1 if kind == "features" else -2)


def fill(layer: nn.Module, mesh: Mesh) -> None:
    """Give every parameter whole values that depend on its name only, so that they are those of the reference."""
    shapes = {name: p.shape for name, p in placements(layer, mesh).items()}
    load_full_state(layer, {name: noise(name, *s) / (s[-1] ** 0.5 if len(s) > 1 else 1) for name, s in shapes.items()})


def gradient(x: Tensor) -> Tensor:
    """The gradient that backward must have left."""
    assert x.grad is not None
    return x.grad


def evaluate(
    layer: nn.Module,
    x: Tensor,
    dy: Tensor,
    mesh: Mesh,
    *,
    forward: Callable[[Tensor], Tensor] | None = None,
    kinds: tuple[str, str] = ("tokens", "tokens"),
) -> dict[str, Tensor]:
    """The whole output, input gradient and parameter gradients of a layer, of whole x and dy; collective."""
    part = take(x, kinds[0], mesh).detach().requires_grad_()
    cotangent = take(dy, kinds[1], mesh)
    before = cotangent.clone()
    y = (forward or layer)(part)
    y.backward(cotangent)
    assert torch.equal(cotangent, before), "the incoming gradient was written to"
    reduce_partial_gradients(layer)
    gradients = {name: full_gradient(layer, name) for name, p in layer.named_parameters() if p.requires_grad}
    return {"y": whole(y.detach(), kinds[1], mesh), "dx": whole(gradient(part), kinds[0], mesh), **gradients}


def on_layouts(case: Callable[[Mesh, torch.dtype], dict[str, Tensor]], backend: Backend = "torch") -> Results:
    """The case's tensors in every layout and dtype, as arrays (which travel between processes more cheaply)."""
    return {
        f"{layout} {name}": {key: value.numpy() for key, value in case(mesh, getattr(torch, name)).items()}
        for layout, mesh in meshes().items()
        for name in DTYPES[backend]
    }


def prove(
    ranks: Ranks, run: Callable[..., Results], expected: dict[str, Tensor], *args: Any, backend: Backend = "torch"
) -> None:
    """run(*args), which ends in `on_layouts`, gives what is expected, here and on each of four processes."""
    seen: set[str] = set()
    for rank, results in enumerate([run(*args), *ranks(run, 4, *args)], start=-1):
        for layout, result in results.items():
            seen.add(layout)
            assert result.keys() == expected.keys()
            for name, value in result.items():
                error = difference(value, expected[name])
                assert error <= TOLERANCE[layout.split()[-1]], f"{layout}, rank {rank}: {name} is off by {error:.1e}"
    assert len(seen) == 6 * len(DTYPES[backend])


def difference(value: npt.NDArray[Any], expected: Tensor) -> float:
    """The largest error, relative to the largest expected value; infinite if the shapes differ or it is no number."""
    if value.shape != tuple(expected.shape) or not np.isfinite(value).all():
        return float("inf")
    error, scale = np.abs(value - expected.detach().numpy()).max(), expected.abs().max().item()
    return float(error / scale) if scale else float(error)
