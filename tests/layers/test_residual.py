"""The residual that a row layer, and the MLPs that end in one, add to their output: y + residual at any layout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import Ranks
from tests.layers.prove import Results, evaluate, fill, gradient, noise, on_layouts, prove, take, whole
from tpformer import MLP, AttentionConfig, DecoderBlock, GatedMLP, Mesh, RMSNorm, RowParallelLinear, SelfAttention

B, S, D, FFN = 2, 8, 12, 16
KINDS: dict[str, tuple[Callable[[Mesh], Any], str]] = {
    "row": (lambda mesh: RowParallelLinear(D, D, mesh=mesh), "features"),
    "row without bias": (lambda mesh: RowParallelLinear(D, D, bias=False, mesh=mesh), "features"),
    "row of a whole input": (lambda mesh: RowParallelLinear(D, D, mesh=mesh, input_is_parallel=False), "whole"),
    "gelu": (lambda mesh: MLP(D, FFN, mesh=mesh), "tokens"),
    "relu": (lambda mesh: MLP(D, FFN, "relu", mesh=mesh), "tokens"),
    "gated": (lambda mesh: GatedMLP(D, FFN, mesh=mesh), "tokens"),
    "gated with bias": (lambda mesh: GatedMLP(D, FFN, bias=True, mesh=mesh), "tokens"),
}
Add = Callable[[Any, Tensor, Tensor], Tensor]
"""A layer, its input and the residual -> their sum."""
ADDS: dict[str, Add] = {
    "inside": lambda layer, x, residual: layer(x, residual),
    "outside": lambda layer, x, residual: layer(x) + residual,
    "on every rank": lambda layer, x, residual: layer(x) + tp_of(layer) * residual,
    "forgotten": lambda layer, x, residual: layer(x) + 0 * residual,
}


def tp_of(layer: nn.Module) -> int:
    return next(m.mesh.tp.size for m in layer.modules() if isinstance(m, RowParallelLinear))


def on(name: str, add: str, mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, and every gradient, the residual's among them; it lies in memory the other way round."""
    build, part = KINDS[name]
    layer = build(mesh).to(dtype)
    fill(layer, mesh)
    x, dy, residual = (noise(n, B, S, D).to(dtype) for n in ("x", "dy", "residual"))
    mine = take(residual, "tokens", mesh).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    before = mine.detach().clone()
    found = evaluate(layer, x, dy, mesh, forward=lambda x: ADDS[add](layer, x, mine), kinds=(part, "tokens"))
    assert torch.equal(mine, before), "the residual was written to"
    return found | {"dresidual": whole(gradient(mine), "tokens", mesh)}


def run(name: str, add: str) -> Results:
    return on_layouts(lambda mesh, dtype: on(name, add, mesh, dtype))


@pytest.mark.parametrize("name", KINDS)
def test_a_residual_inside_is_one_outside(name: str, ranks: Ranks) -> None:
    prove(ranks, run, on(name, "outside", Mesh(), torch.float64), name, "inside")


@pytest.mark.parametrize("add", ["on every rank", "forgotten"])
def test_a_residual_added_wrongly_is_seen(add: str, ranks: Ranks) -> None:
    """Negative controls."""
    with pytest.raises(AssertionError, match="y is off by"):
        prove(ranks, run, on("gelu", "outside", Mesh(), torch.float64), "gelu", add)


def run_wide() -> list[bool]:
    """Whether the sum with an fp64 residual is the fp64 sum, on each layout."""
    same = []
    for mesh in (Mesh(), Mesh.create(tp=2)):
        layer = RowParallelLinear(D, D, mesh=mesh)
        x, residual = take(noise("x", B, S, D).float(), "features", mesh), noise("residual", B, S, D)
        y = layer(x, residual)
        same.append(y.dtype == torch.float64 and torch.equal(y, layer(x) + residual))
    return same


def test_a_wider_residual_is_not_rounded(ranks: Ranks) -> None:
    """On any layout the same."""
    assert ranks(run_wide, 2) == [[True, True]] * 2


def test_a_wider_bias_is_not_rounded() -> None:
    """Alone too, where the matmul could add it."""
    layer, x = RowParallelLinear(D, D).bfloat16(), noise("x", B, S, D).bfloat16()
    assert layer.bias is not None
    product = layer(x) - layer.bias
    layer.bias.data = noise("bias", D).float()
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, product + layer.bias, rtol=0, atol=0.05)


class Plain(nn.Linear):
    """A projection or an MLP that a user puts in the place of ours: it knows of no residual."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Halved(RowParallelLinear):
    """One derived from ours."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) / 2


class Doubled(MLP):
    """And an MLP derived from ours."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", [MLP, GatedMLP])
@pytest.mark.parametrize("down", [Plain, Halved])
def test_a_replaced_projection_is_asked_for_its_output_only(kind: Any, down: Any) -> None:
    mlp, x, residual = kind(D, FFN).double(), noise("x", B, S, D), noise("residual", B, S, D)
    mlp.down = down(FFN, D).double()
    assert torch.equal(mlp(x, residual), mlp(x) + residual)
    mlp.down = RowParallelLinear(FFN, D).double()
    torch.testing.assert_close(mlp(x, residual), mlp(x) + residual, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mlp", [MLP(D, FFN), GatedMLP(D, FFN), Doubled(D, FFN), Plain(D, D)], ids=lambda m: type(m))
def test_a_block_gives_its_residual_to_our_own_mlps_only(mlp: nn.Module) -> None:
    """Whichever it has, it adds what the MLP gives for the normed tokens, once."""
    config = AttentionConfig(hidden_size=D, num_heads=2, num_kv_heads=2, head_dim=6)
    block = DecoderBlock(SelfAttention(config), mlp, RMSNorm(D), RMSNorm(D)).double()
    given: list[int] = []
    handle = mlp.register_forward_pre_hook(lambda module, inputs: given.append(len(inputs)))
    x = noise("x", B, S, D)
    y = block(x)
    handle.remove()
    assert given == [2 if type(mlp) in (MLP, GatedMLP) else 1]
    attended = x + block.attention(block.attention_norm(x))
    torch.testing.assert_close(y, attended + mlp(block.mlp_norm(attended)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "mlp.down"])
def test_a_hook_sees_the_output_without_the_residual(name: str) -> None:
    config = AttentionConfig(hidden_size=D, num_heads=2, num_kv_heads=2, head_dim=6)
    block = DecoderBlock(SelfAttention(config), MLP(D, FFN), RMSNorm(D), RMSNorm(D)).double()
    x = noise("x", B, S, D)
    expected, seen = block(x), []
    block.get_submodule(name).register_forward_hook(lambda module, inputs, y: seen.append(y))
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)
    attended = x + block.attention(block.attention_norm(x))
    torch.testing.assert_close(seen[0], expected - attended, rtol=1e-12, atol=1e-12)
