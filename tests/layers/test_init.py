"""Initial weights: bit for bit the same at any layout, while no rank ever draws more than its own part."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import Ranks
from tests.layers.prove import meshes
from tpformer import (
    AttentionConfig,
    Axis,
    ColumnParallelLinear,
    GatedMLP,
    Mesh,
    PositionEmbedding,
    RowParallelLinear,
    SelfAttention,
    VocabParallelEmbedding,
    VocabParallelHead,
    full_parameter,
)
from tpformer.layers import init

ATTENTION = AttentionConfig(hidden_size=24, num_heads=8, num_kv_heads=8, head_dim=6, qkv_bias=True, out_bias=True)
LAYERS: dict[str, Callable[[Mesh], nn.Module]] = {
    "column": lambda mesh: ColumnParallelLinear(24, 64, mesh=mesh),
    "column, odd": lambda mesh: ColumnParallelLinear(23, 28, mesh=mesh),
    "column, interleaved": lambda mesh: ColumnParallelLinear(24, 64, interleave=2, mesh=mesh),
    "row": lambda mesh: RowParallelLinear(64, 24, mesh=mesh),
    "row, odd": lambda mesh: RowParallelLinear(28, 23, mesh=mesh),  # 7 columns a rank: not a multiple of 4
    "embedding": lambda mesh: VocabParallelEmbedding(101, 24, mesh=mesh),
    "head": lambda mesh: VocabParallelHead(24, 101, mesh=mesh),
    "position": lambda mesh: PositionEmbedding(30, 24, mesh=mesh),
    "attention": lambda mesh: SelfAttention(ATTENTION, mesh=mesh),
    "attention with copied keys": lambda mesh: SelfAttention(replace(ATTENTION, num_kv_heads=2), mesh=mesh),
    "MQA": lambda mesh: SelfAttention(replace(ATTENTION, num_kv_heads=1), mesh=mesh),
    "gated MLP": lambda mesh: GatedMLP(24, 64, bias=True, mesh=mesh),
}


def run(name: str) -> dict[str, dict[str, npt.NDArray[Any]]]:
    """The whole initial weights in each layout, and what torch's generator gives next."""
    weights = {}
    for layout, mesh in meshes().items():
        torch.manual_seed(7)
        layer = LAYERS[name](mesh)
        whole = {parameter: full_parameter(layer, parameter).numpy() for parameter, _ in layer.named_parameters()}
        weights[layout] = {**whole, "what comes next": torch.rand(3).numpy()}
    return weights


@pytest.mark.parametrize("name", LAYERS)
def test_the_layout_does_not_change_a_bit(ranks: Ranks, name: str) -> None:
    expected = run(name)["tp 1"]
    for results in [run(name), *ranks(run, 4, name)]:
        for layout, weights in results.items():
            assert weights.keys() == expected.keys()
            for parameter, value in weights.items():
                assert value.tobytes() == expected[parameter].tobytes(), f"{parameter}, {layout}"


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that anything makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        self.numel = max(
            [self.numel, *(t.untyped_storage().nbytes() // 8 for t in made if isinstance(t, torch.Tensor))]
        )
        return result


def largest(make: Callable[[Mesh], nn.Module], mesh: Mesh, chunk: int) -> int:
    with patch.object(init, "CHUNK", chunk), Largest() as seen:
        make(mesh)
    return seen.numel


BIG: dict[str, Callable[[Mesh], nn.Module]] = {
    "column": lambda mesh: ColumnParallelLinear(64, 512, mesh=mesh),
    "row": lambda mesh: RowParallelLinear(512, 64, mesh=mesh),
    "embedding": lambda mesh: VocabParallelEmbedding(512, 64, mesh=mesh),
    "head": lambda mesh: VocabParallelHead(64, 512, mesh=mesh),
}


@pytest.mark.parametrize("name", BIG)
@pytest.mark.parametrize("rank", [0, 3])
def test_no_rank_makes_the_whole_weight(name: str, rank: int) -> None:
    """Storage in units of 8 bytes; the weight has 512 x 64 numbers, a rank's part a quarter of them in 4 bytes."""
    part = 512 * 64 // 4
    assert largest(BIG[name], Mesh(tp=Axis("tp", 4, rank)), chunk=1 << 10) == part // 2
    # the observer does see a whole weight, and whole random words, where they are made
    assert largest(BIG[name], Mesh(), chunk=1 << 10) == 512 * 64 // 2
    assert largest(BIG[name], Mesh(), chunk=1 << 30) >= 512 * 64


@pytest.mark.parametrize("name", LAYERS)
def test_the_size_of_the_chunks_does_not_matter(name: str) -> None:
    weights = []
    for chunk in (1, 100, 1 << 20):
        torch.manual_seed(1)
        with patch.object(init, "CHUNK", chunk):
            weights.append([p.detach() for p in LAYERS[name](Mesh(tp=Axis("tp", 2, 1))).parameters()])
    for other in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], other, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_torch_s_seed_reproduces_and_two_layers_differ(name: str) -> None:
    torch.manual_seed(3)
    first, second = LAYERS[name](Mesh()), LAYERS[name](Mesh())
    torch.manual_seed(3)
    again = LAYERS[name](Mesh())
    for (parameter, a), b, c in zip(first.named_parameters(), second.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, c), parameter
        assert not (a == b)[a != 0].any(), parameter


def test_uniform_weights_have_torch_nn_s_range_and_moments() -> None:
    torch.manual_seed(0)
    ours, theirs = ColumnParallelLinear(100, 400), torch.nn.Linear(100, 400)
    for mine, torchs in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        assert mine.abs().max() <= 0.1
        assert mine.abs().max() > 0.09
        n, variance = mine.numel(), 0.1**2 / 3
        assert abs(mine.mean()) < 5 * (variance / n) ** 0.5
        assert abs(mine.var() - variance) < 5 * variance * (0.8 / n) ** 0.5  # the 4th moment of a uniform is 9/5
        assert abs(mine.std() / torchs.std() - 1) < 0.15


@pytest.mark.parametrize("make", [LAYERS["embedding"], LAYERS["position"]], ids=["embedding", "position"])
def test_tables_are_normal(make: Callable[[Mesh], nn.Module]) -> None:
    torch.manual_seed(0)
    weight = next(iter(make(Mesh()).parameters())).detach()[:101].double().flatten()
    weight = weight[weight != 0]
    n = len(weight)
    assert abs(weight.mean()) < 5 / n**0.5
    assert abs(weight.var() - 1) < 5 * (2 / n) ** 0.5
    # Kolmogorov-Smirnov: the distance from the normal distribution, beyond which chance goes once in 10^5 times
    ordered = torch.special.ndtr(weight.sort().values).numpy()
    steps = np.arange(n + 1) / n
    assert max(np.abs(ordered - steps[1:]).max(), np.abs(ordered - steps[:-1]).max()) < 2.47 / n**0.5


def test_layers_on_the_meta_device_are_left_alone() -> None:
    torch.manual_seed(5)
    with torch.device("meta"):
        layers = [make(Mesh()) for make in LAYERS.values()]
    assert all(p.is_meta for layer in layers for p in layer.parameters())
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)  # and take no number from the generator
