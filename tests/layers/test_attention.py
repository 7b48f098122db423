"""Attention against torch's own with separate q, k, v weights and explicit masks: every head layout, at any tp."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tests.distributed import Ranks
from tests.layers.prove import (
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
    AttentionConfig,
    Axis,
    Key,
    Mesh,
    SelfAttention,
    full_gradient,
    full_parameter,
    load_full_state,
    reduce_partial_gradients,
    trace_communication,
)
from tpformer_kernels import random_columns

B, S, D, H, K = 2, 8, 10, 8, 4
BASE = AttentionConfig(hidden_size=D, num_heads=H, num_kv_heads=H, head_dim=K)
CASES = {
    "MHA": BASE,
    "GQA with kv_heads above and equal to tp": replace(BASE, num_kv_heads=4),
    "GQA with kv_heads below and equal to tp": replace(BASE, num_kv_heads=2),
    "MQA": replace(BASE, num_kv_heads=1),
    "window of 1": replace(BASE, sliding_window=1),
    "window of 3": replace(BASE, sliding_window=3),
    "window of all but one": replace(BASE, sliding_window=S - 1),
    "window of the length": replace(BASE, sliding_window=S),
    "window beyond the length": replace(BASE, sliding_window=S + 5),
    "not causal": replace(BASE, causal=False),
    "not causal, window of 3": replace(BASE, causal=False, sliding_window=3, num_kv_heads=2),
    "qk_norm": replace(BASE, qk_norm=True),
    "qk_norm with copied keys": replace(BASE, qk_norm=True, num_kv_heads=2),
    "biases": replace(BASE, qkv_bias=True, out_bias=True),
    "biases with copied keys": replace(BASE, qkv_bias=True, out_bias=True, num_kv_heads=1),
    "rope": BASE,
    "rope and everything": replace(
        BASE, num_kv_heads=2, qkv_bias=True, out_bias=True, qk_norm=True, sliding_window=3, norm_eps=1e-2
    ),
    "dropout": replace(BASE, dropout=0.4),
    "dropout and everything": replace(BASE, dropout=0.4, num_kv_heads=2, qkv_bias=True, qk_norm=True, sliding_window=3),
    "dropout, not causal": replace(BASE, dropout=0.4, causal=False),
}
KEY = replace(Key(11), sample=5)


def build(config: AttentionConfig, mesh: Mesh, dtype: torch.dtype = torch.float64) -> SelfAttention:
    layer = SelfAttention(config, mesh=mesh).to(dtype)
    fill(layer, mesh)
    return layer


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return noise("x", B, S, D).to(dtype), noise("dy", B, S, D).to(dtype)


def extras(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """What the case hands to forward beside x."""
    table = (angles().unsqueeze(1).cos().to(dtype), angles().unsqueeze(1).sin().to(dtype))
    return {"rope": table if "rope" in name else None, "key": KEY if "dropout" in name else None}


def run(name: str) -> Results:
    def case(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
        layer = build(CASES[name], mesh, dtype)
        return evaluate(layer, *tensors(dtype), mesh, forward=lambda x: layer(x, **extras(name, dtype)))

    return on_layouts(case)


def split_heads(fused: Tensor, c: AttentionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of q, k and v, as in a model without fused weights, from the fused weight or bias."""
    grouped = fused.unflatten(0, (c.num_kv_heads, c.num_heads // c.num_kv_heads + 2, c.head_dim))
    q, k, v = grouped[:, :-2].flatten(0, 2), grouped[:, -2].flatten(0, 1), grouped[:, -1].flatten(0, 1)
    return q, k, v


def mask_of(c: AttentionConfig) -> Tensor:
    """Which key each query sees, entry by entry."""
    window = c.sliding_window or S
    seen = [[(j <= i or not c.causal) and abs(i - j) < window for j in range(S)] for i in range(S)]
    return torch.tensor(seen)


def kept_of(c: AttentionConfig) -> Tensor:
    """Which probabilities dropout keeps: a number for each global (sample, head, query, key)."""
    index = [torch.arange(n) for n in (B, c.num_heads, S)]
    sample, head, query = index[0].view(-1, 1, 1) + KEY.sample, index[1].view(-1, 1), index[2]
    return random_columns(KEY.seed, (query, sample, head), 0, S) >= round(c.dropout * 2**32)


def angles() -> Tensor:
    """The rotation of each position and pair, (s, k/2)."""
    return torch.outer(torch.arange(S).double(), 100.0 ** (-torch.arange(0, K, 2).double() / K))


def turn(x: Tensor) -> Tensor:
    """Rotate heads (b, h, s, k) by position, pairs as complex numbers."""
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles()), angles())
    return torch.cat([turned.real, turned.imag], dim=-1)


def reference(name: str) -> dict[str, Tensor]:
    c = CASES[name]
    p = {n: q.detach().requires_grad_() for n, q in build(c, Mesh()).named_parameters()}
    x, dy = tensors()
    x.requires_grad_()
    biases = split_heads(p["qkv.bias"], c) if c.qkv_bias else (None, None, None)
    q, k, v = (
        rearrange(F.linear(x, weight, bias), "b s (h k) -> b h s k", k=K)
        for weight, bias in zip(split_heads(p["qkv.weight"], c), biases, strict=True)
    )
    if c.qk_norm:
        q, k = (F.rms_norm(t, (K,), p[f"{n}_norm.weight"], c.norm_eps) for t, n in ((q, "q"), (k, "k")))
    if "rope" in name:
        q, k = turn(q), turn(k)
    if "dropout" in name:
        k, v = (t.repeat_interleave(c.num_heads // c.num_kv_heads, dim=1) for t in (k, v))
        scores = (q @ k.transpose(2, 3) / K**0.5).masked_fill(~mask_of(c), -torch.inf)
        y = scores.softmax(-1) * kept_of(c) / (1 - c.dropout) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask_of(c), enable_gqa=True)
    y = F.linear(rearrange(y, "b h s k -> b s (h k)"), p["out.weight"], p.get("out.bias"))
    y.backward(dy)
    return {"y": y, "dx": gradient(x), **{n: gradient(q) for n, q in p.items()}}


@pytest.mark.parametrize("name", CASES)
def test_is_torch_s_attention(ranks: Ranks, name: str) -> None:
    expected = reference(name)
    prove(ranks, run, expected, name)


def test_the_reference_tells_its_cases_apart() -> None:
    """Negative control: no option could be ignored without a difference well above the tolerance."""
    plain = {kv: reference(name)["y"] for kv, name in ((8, "MHA"), (2, "GQA with kv_heads below and equal to tp"))}
    for name in ("window of 3", "not causal", "qk_norm", "biases", "rope", "dropout"):
        assert difference(reference(name)["y"].detach().numpy(), plain[8]) > 0.01, name
    assert difference(reference("qk_norm with copied keys")["y"].detach().numpy(), plain[2]) > 0.01
    assert torch.equal(reference("window of the length")["y"], plain[8])


def test_the_weight_is_grouped_by_kv_head() -> None:
    """One line states it: the rows of a KV head's queries, then its key, then its value."""
    c = replace(BASE, num_kv_heads=2)
    q, k, v = noise("q", H * K, D), noise("k", 2 * K, D), noise("v", 2 * K, D)
    fused = torch.cat([rearrange(t, "(kv g k) d -> kv (g k) d", kv=2, k=K) for t in (q, k, v)], dim=1).flatten(0, 1)
    for mine, expected in zip(split_heads(fused, c), (q, k, v), strict=True):
        assert torch.equal(mine, expected)


def run_block_wise() -> Results:
    """The output with q, k and v loaded as blocks, one after the other, instead of per KV head."""

    def case(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
        c = CASES["GQA with kv_heads above and equal to tp"]
        layer = build(c, mesh, dtype)
        state = {name: full_parameter(layer, name) for name, _ in layer.named_parameters()}
        state["qkv.weight"] = torch.cat(split_heads(state["qkv.weight"], c))
        load_full_state(layer, state)
        return {"y": evaluate(layer, *tensors(dtype), mesh)["y"]}

    return on_layouts(case)


def test_a_block_wise_fused_weight_is_another_model(ranks: Ranks) -> None:
    """Negative control."""
    expected = reference("GQA with kv_heads above and equal to tp")["y"]
    for results in [run_block_wise(), *ranks(run_block_wise, 4)]:
        for layout, result in results.items():
            assert difference(result["y"], expected) > 0.01, layout


def run_without_reduction(name: str) -> dict[str, str]:
    answers = {}
    for layout, mesh in meshes().items():
        layer = build(CASES[name], mesh)
        x, dy = (take(t, "tokens", mesh) for t in tensors())
        layer(x).backward(dy)
        for reduced in (False, True):
            if reduced:
                reduce_partial_gradients(layer)
            for parameter in ("qkv.weight", "q_norm.weight"):
                try:
                    full_gradient(layer, parameter)
                    answer = "whole"
                except RuntimeError as error:
                    answer = str(error)
                answers[f"{layout}, {parameter}, {'reduced' if reduced else 'partial'}"] = answer
    return answers


def test_copied_gradients_that_were_not_summed_are_an_error(ranks: Ranks) -> None:
    """Negative control: at tp 4 two ranks share a KV head, at tp 2 none do; the norms' gradients are always partial."""
    for answers in ranks(run_without_reduction, 4, "qk_norm with copied keys"):
        for where, answer in answers.items():
            wrong = where.endswith("partial") and ("q_norm" in where or where.startswith("tp 4"))
            assert answer.startswith("copies of this tensor differ" if wrong else "whole"), where


def run_counts() -> dict[str, list[str]]:
    counts = {}
    for layout, mesh in meshes().items():
        layer = build(CASES["rope and everything"], mesh)
        x = take(tensors()[0], "tokens", mesh).requires_grad_()
        with trace_communication() as trace:
            y = layer(x, **extras("rope", torch.float64))
            y.backward(torch.ones_like(y))
        counts[layout] = [f"{call.phase} {call.op}" for call in trace.calls]
    return counts


def test_one_all_reduce_forward_and_one_backward(ranks: Ranks) -> None:
    pair = ["forward all_gather", "forward reduce_scatter"]
    pair += ["backward all_gather", "backward all_gather", "backward reduce_scatter"]
    for counts in ranks(run_counts, 4):
        for layout, calls in counts.items():
            assert calls == (pair if "sequence" in layout else ["forward all_reduce", "backward all_reduce"]), layout


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "message"),
    [
        (6, 6, 4, r"num_heads \(6\) must be divisible by tp \(4\)"),
        (8, 3, 2, r"num_heads \(8\) must be divisible by num_kv_heads \(3\)"),
        (12, 6, 4, r"num_kv_heads \(6\) must be divisible by tp \(4\)"),
        (12, 3, 4, r"tp \(4\) must be divisible by num_kv_heads \(3\)"),
    ],
)
def test_heads_that_do_not_divide_are_named(heads: int, kv_heads: int, tp: int, message: str) -> None:
    config = replace(BASE, num_heads=heads, num_kv_heads=kv_heads)
    with pytest.raises(ValueError, match=message):
        SelfAttention(config, mesh=Mesh(tp=Axis("tp", tp)))


@pytest.mark.parametrize(("kv_heads", "rows"), [(8, [24, 24, 24, 24]), (2, [16, 16, 16, 16]), (1, [16, 16, 16, 16])])
def test_each_rank_holds_its_queries_and_the_keys_they_need(kv_heads: int, rows: list[int]) -> None:
    held = [SelfAttention(replace(BASE, num_kv_heads=kv_heads), mesh=Mesh(tp=Axis("tp", 4, r))) for r in range(4)]
    assert [len(layer.qkv.weight) for layer in held] == rows
    assert [layer.out.weight.shape for layer in held] == [(D, H * K // 4)] * 4


def test_dropout_needs_a_key() -> None:
    layer, (x, _) = build(CASES["dropout"], Mesh()), tensors()
    assert torch.equal(layer(x), build(BASE, Mesh())(x))
    assert not torch.equal(layer(x, key=Key(1)), layer(x, key=Key(2)))
