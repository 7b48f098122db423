"""The MLPs against plain torch at any layout, and the layout of the gated weight that makes any split right."""

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
    whole,
)
from tpformer import MLP, ColumnParallelLinear, GatedMLP, Mesh, load_full_state, trace_communication
from tpformer_kernels import Backend

B, S, D, FFN = 2, 8, 6, 20
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
CASES: dict[str, tuple[type[MLP] | type[GatedMLP], str, bool]] = {
    "relu": (MLP, "relu", True),
    "gelu": (MLP, "gelu", True),
    "gelu_tanh": (MLP, "gelu_tanh", True),
    "gelu without bias": (MLP, "gelu", False),
    "gated silu": (GatedMLP, "silu", False),
    "gated gelu": (GatedMLP, "gelu", False),
    "gated gelu_tanh": (GatedMLP, "gelu_tanh", False),
    "gated silu with bias": (GatedMLP, "silu", True),
}


def build(name: str, mesh: Mesh, dtype: torch.dtype, backend: Backend = "auto") -> MLP | GatedMLP:
    kind, activation, bias = CASES[name]
    mlp = kind(D, FFN, activation, bias, mesh=mesh, backend=backend)
    fill(mlp.to(dtype), mesh)
    return mlp


def run(name: str, backend: Backend) -> Results:
    def case(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
        x, dy = noise("x", B, S, D).to(dtype), noise("dy", B, S, D).to(dtype)
        return evaluate(build(name, mesh, dtype, backend), x, dy, mesh)

    return on_layouts(case, backend)


def reference(name: str) -> dict[str, Tensor]:
    kind, activation, _ = CASES[name]
    act = ACTIVATIONS[activation]
    p = {n: q.detach().requires_grad_() for n, q in build(name, Mesh(), torch.float64).named_parameters()}
    x = noise("x", B, S, D).requires_grad_()
    up = "gate_up" if kind is GatedMLP else "up"
    hidden = F.linear(x, p[f"{up}.weight"], p.get(f"{up}.bias"))
    hidden = act(hidden[..., 0::2]) * hidden[..., 1::2] if kind is GatedMLP else act(hidden)
    y = F.linear(hidden, p["down.weight"], p.get("down.bias"))
    y.backward(noise("dy", B, S, D))
    return {"y": y, "dx": gradient(x), **{n: gradient(q) for n, q in p.items()}}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_is_plain_torch_s(ranks: Ranks, name: str, backend: Backend) -> None:
    prove(ranks, run, reference(name), name, backend, backend=backend)


def of_transformers() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """transformers' Llama MLP: its output and input gradient, and its weights (gate and up apart)."""
    from transformers import LlamaConfig  # here, because the other processes need not wait for it
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = LlamaConfig(hidden_size=D, intermediate_size=FFN, num_attention_heads=1, hidden_act="silu")
    theirs = LlamaMLP(config).double()
    fill(theirs, Mesh())
    x = noise("x", B, S, D).requires_grad_()
    y = theirs(x)
    y.backward(noise("dy", B, S, D))
    return {"y": y.detach(), "dx": gradient(x)}, {name: q.detach() for name, q in theirs.named_parameters()}


def run_with_weights(weights: dict[str, Tensor]) -> Results:
    def case(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
        mlp = build("gated silu", mesh, dtype)
        load_full_state(mlp, weights)
        x, dy = noise("x", B, S, D).to(dtype), noise("dy", B, S, D).to(dtype)
        result = evaluate(mlp, x, dy, mesh)
        return {"y": result["y"], "dx": result["dx"]}

    return on_layouts(case)


def test_interleaved_gate_and_up_are_the_mlp_of_llama(ranks: Ranks) -> None:
    expected, theirs = of_transformers()
    gate, up, down = (theirs[f"{name}_proj.weight"] for name in ("gate", "up", "down"))
    interleaved = torch.stack([gate, up], dim=1).flatten(0, 1)
    prove(ranks, run_with_weights, expected, {"gate_up.weight": interleaved, "down.weight": down})


def test_gate_and_up_stored_as_blocks_are_another_model(ranks: Ranks) -> None:
    """Negative control: with gate and up one after the other no layout gives the right output."""
    expected, theirs = of_transformers()
    gate, up, down = (theirs[f"{name}_proj.weight"] for name in ("gate", "up", "down"))
    blocks = {"gate_up.weight": torch.cat([gate, up]), "down.weight": down}
    for results in [run_with_weights(blocks), *ranks(run_with_weights, 4, blocks)]:
        for layout, result in results.items():
            assert difference(result["y"], expected["y"]) > 0.1, layout


def run_split_as_blocks(gate: Tensor, up: Tensor, down: Tensor) -> npt.NDArray[Any]:
    """The output at tp 2 if each rank takes its contiguous half of [gate; up] for its own gate and up."""
    mesh = meshes()["tp 2"]
    mine = torch.cat([gate, up]).chunk(2)[mesh.tp.rank]
    first, second = (noise("x", B, S, D) @ mine.T).chunk(2, dim=-1)
    y = F.silu(first) * second @ take(down, "features", mesh).T
    return whole(y.unsqueeze(-1), "features", mesh).sum(-1).numpy()


def test_a_block_wise_split_is_wrong_in_itself(ranks: Ranks) -> None:
    expected, theirs = of_transformers()
    for y in ranks(run_split_as_blocks, 4, *(theirs[f"{name}_proj.weight"] for name in ("gate", "up", "down"))):
        assert difference(y, expected["y"]) > 0.1


@pytest.mark.parametrize(
    ("kind", "names"), [(MLP, "gelu, gelu_tanh, relu"), (GatedMLP, "silu, gelu, gelu_tanh")], ids=["MLP", "GatedMLP"]
)
def test_an_unknown_activation_is_named(kind: type[MLP] | type[GatedMLP], names: str) -> None:
    with pytest.raises(ValueError, match=rf"activation \('swish'\) must be one of {names}"):
        kind(4, 8, "swish")


def run_counts(name: str, backend: Backend) -> dict[str, list[str]]:
    counts = {}
    for layout, mesh in meshes().items():
        x = take(noise("x", B, S, D).float(), "tokens", mesh).requires_grad_()
        mlp = build(name, mesh, torch.float32, backend)
        with trace_communication() as trace:
            y = mlp(x)
            y.backward(torch.ones_like(y))
        counts[layout] = [f"{call.phase} {call.op}" for call in trace.calls]
    return counts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gelu", "gated silu"])
def test_one_all_reduce_forward_and_one_backward(ranks: Ranks, name: str, backend: Backend) -> None:
    pair = ["forward all_gather", "forward reduce_scatter"]
    pair += ["backward all_gather", "backward all_gather", "backward reduce_scatter"]
    for counts in ranks(run_counts, 4, name, backend):
        for layout, calls in counts.items():
            assert calls == (pair if "sequence" in layout else ["forward all_reduce", "backward all_reduce"]), layout


class Tripled(ColumnParallelLinear):
    """What a user may put in the place of a projection."""

    def forward(self, x: Tensor, **options: Any) -> Any:
        return 3 * super().forward(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_hooks_and_replacements_of_the_projection_count(kind: str, backend: Backend) -> None:
    make = (lambda: MLP(D, FFN, backend=backend)) if kind == "gelu" else (lambda: GatedMLP(D, FFN, backend=backend))
    mlp, x, calls = make(), noise("x", B, S, D).float(), []
    name = "up" if kind == "gelu" else "gate_up"
    plain = mlp(x)
    hook = getattr(mlp, name).register_forward_hook(lambda layer, inputs, output: calls.append(output))
    torch.testing.assert_close(mlp(x), plain, rtol=1e-5, atol=1e-5)
    hook.remove()
    assert len(calls) == 1
    torch.testing.assert_close(calls[0], getattr(mlp, name)(x))  # one tensor, with the bias
    replacement = Tripled(D, FFN if kind == "gelu" else 2 * FFN, kind == "gelu", interleave=1 if kind == "gelu" else 2)
    replacement.load_state_dict(getattr(mlp, name).state_dict())
    setattr(mlp, name, replacement)
    tripled = mlp(x)
    with torch.no_grad():
        for parameter in replacement.parameters():
            parameter.mul_(3)
    replacement.forward = lambda x, **options: ColumnParallelLinear.forward(replacement, x)  # type: ignore[method-assign]
    torch.testing.assert_close(mlp(x), tripled, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(tripled, plain)
