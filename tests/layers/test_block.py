"""The decoder block against plain torch: outputs, gradients, dropout and its count of collectives."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed import Ranks
from tests.layers.prove import (
    BACKENDS,
    Results,
    difference,
    evaluate,
    fill,
    gradient,
    meshes,
    noise,
    on_layouts,
    prove,
    take,
)
from tpformer import (
    MLP,
    AttentionConfig,
    DecoderBlock,
    GatedMLP,
    Key,
    LayerNorm,
    Mesh,
    RMSNorm,
    SelfAttention,
    trace_communication,
)
from tpformer_kernels import Backend

B, S, D, FFN, HEADS = 2, 8, 12, 16, 4
CONFIG = AttentionConfig(hidden_size=D, num_heads=HEADS, num_kv_heads=HEADS, head_dim=4, dropout=0.3)


def make(kind: str, mesh: Mesh, dtype: torch.dtype, dropout: float = 0.0, backend: Backend = "auto") -> DecoderBlock:
    """A block as in Llama or in GPT-2."""
    config = replace(CONFIG, dropout=dropout, qkv_bias=kind == "gpt", out_bias=kind == "gpt", backend=backend)
    options: dict[str, Any] = {"mesh": mesh, "backend": backend}
    norms = [(RMSNorm if kind == "llama" else LayerNorm)(D, **options) for _ in range(2)]
    mlp = GatedMLP(D, FFN, **options) if kind == "llama" else MLP(D, FFN, **options)
    block = DecoderBlock(SelfAttention(config, mesh=mesh), mlp, *norms, dropout=dropout, **options).to(dtype)
    fill(block, mesh)
    return block


def run_block(kind: str, backend: Backend) -> Results:
    def case(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
        x, dy = noise("x", B, S, D).to(dtype), noise("dy", B, S, D).to(dtype)
        return evaluate(make(kind, mesh, dtype, backend=backend), x, dy, mesh)

    return on_layouts(case, backend)


def reference(kind: str) -> dict[str, Tensor]:
    """The block from torch's functions, on whole fp64 tensors."""
    block = make(kind, Mesh(), torch.float64)
    p = {name: parameter.detach().requires_grad_() for name, parameter in block.named_parameters()}
    x = noise("x", B, S, D).requires_grad_()

    def norm(name: str, x: Tensor) -> Tensor:
        if kind == "llama":
            return F.rms_norm(x, (D,), p[f"{name}.weight"], 1e-5)
        return F.layer_norm(x, (D,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    q, k, v = (
        F.linear(norm("attention_norm", x), p["attention.qkv.weight"], p.get("attention.qkv.bias"))
        .view(B, S, HEADS, 3, 4)
        .permute(3, 0, 2, 1, 4)
    )
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    h = x + F.linear(attended, p["attention.out.weight"], p.get("attention.out.bias"))
    inner = norm("mlp_norm", h)
    if kind == "llama":
        inner = inner @ p["mlp.gate_up.weight"].T
        inner = F.silu(inner[..., 0::2]) * inner[..., 1::2]
    else:
        inner = F.gelu(F.linear(inner, p["mlp.up.weight"], p["mlp.up.bias"]))
    y = h + F.linear(inner, p["mlp.down.weight"], p.get("mlp.down.bias"))
    y.backward(noise("dy", B, S, D))
    return {"y": y, "dx": gradient(x), **{name: gradient(parameter) for name, parameter in p.items()}}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["llama", "gpt"])
def test_block_is_plain_torch_s(ranks: Ranks, kind: str, backend: Backend) -> None:
    prove(ranks, run_block, reference(kind), kind, backend, backend=backend)


def run_with_dropout(kind: str, name: str, backend: Backend) -> Results:
    def case(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
        x, dy = noise("x", B, S, D).to(dtype), noise("dy", B, S, D).to(dtype)
        block = make(kind, mesh, dtype, dropout=0.4, backend=backend)
        return evaluate(block, x, dy, mesh, forward=lambda x: block(x, None, Key(5).fold(name)))

    return on_layouts(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_inside_a_block_is_the_same_at_any_layout(ranks: Ranks, backend: Backend) -> None:
    results = run_with_dropout("llama", "step 1", "torch")["tp 1 float64"]
    expected = {name: torch.from_numpy(value) for name, value in results.items()}
    prove(ranks, run_with_dropout, expected, "llama", "step 1", backend, backend=backend)
    for other in (reference("llama"), run_with_dropout("llama", "step 2", "torch")["tp 1 float64"]):
        assert difference(results["y"], torch.as_tensor(other["y"])) > 0.1


def test_attention_and_the_two_residuals_drop_with_keys_of_their_own() -> None:
    """The masks of the three uses differ, or dropout would be correlated within a block."""
    seen: list[Key | None] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor, rope: object = None, key: Key | None = None) -> Tensor:
            seen.append(key)
            return torch.ones_like(x)

    block = DecoderBlock(Spy(), Spy(), nn.Identity(), nn.Identity(), dropout=0.5)
    x = torch.zeros(1, 16, 16)
    attended = DecoderBlock(Spy(), nn.Linear(16, 16, bias=False), nn.Identity(), nn.Identity(), dropout=0.5)
    nn.init.zeros_(attended.mlp.weight)  # type: ignore[arg-type]
    first = attended(x, key=Key(1))  # the mask after attention alone
    second = block(x, key=Key(1)) - first
    assert set(first.unique().tolist()) == set(second.unique().tolist()) == {0.0, 2.0}
    assert 0.3 < (first == second).float().mean() < 0.7
    assert seen[0] == Key(1).fold("attention")


def run_counts(kind: str, backend: Backend) -> dict[str, list[str]]:
    counts = {}
    for layout, mesh in meshes().items():
        block = make(kind, mesh, torch.float32, backend=backend)
        x = take(noise("x", B, S, D).float(), "tokens", mesh).requires_grad_()
        with trace_communication() as trace:
            block(x).backward(take(noise("dy", B, S, D).float(), "tokens", mesh))
        counts[layout] = sorted(f"{call.phase} {call.axis} {call.op}" for call in trace.calls)
    return counts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["llama", "gpt"])
def test_one_all_reduce_each_way_in_attention_and_in_the_mlp(ranks: Ranks, kind: str, backend: Backend) -> None:
    """Under sequence parallelism one pair instead; backward gathers what forward did not keep once more."""
    pair = ["backward tp all_gather"] * 4 + ["backward tp reduce_scatter"] * 2
    pair += ["forward tp all_gather"] * 2 + ["forward tp reduce_scatter"] * 2
    for counts in ranks(run_counts, 4, kind, backend):
        for tp in (2, 4):
            assert counts[f"tp {tp}"] == ["backward tp all_reduce"] * 2 + ["forward tp all_reduce"] * 2
            assert counts[f"tp {tp} sequence-parallel"] == pair
    assert run_counts(kind, backend) == {"tp 1": [], "tp 1 sequence-parallel": []}
