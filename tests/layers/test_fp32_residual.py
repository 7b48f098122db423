"""An fp32 residual stream in a bf16 model: where it is fp32, what is sent, and that it is nearer the truth."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed import Ranks
from tests.layers.prove import evaluate, interpreted, noise, on_layouts, prove
from tests.layers.test_block import B, D, S, make, reference
from tests.proofs.cases import Config, Layout, gpt, llama, random_batch
from tests.train.runs import config
from tpformer import GPT, GPTConfig, Key, Llama, Mesh, trace_communication
from tpformer.parallel_config import ParallelConfig
from tpformer.train.build import build as build_training

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MODELS: dict[str, Config] = {
    "gpt": gpt(tie_embeddings=False, num_layers=3),
    "llama": llama(num_kv_heads=2, qk_norm=True, num_layers=3),
}
DROPOUT = {"dropout": 0.2}


def build(config: Config, dtype: torch.dtype, wide: bool, mesh: Mesh = Mesh()) -> Any:
    """A model whose weights bf16 and fp16 hold exactly, so that only computing rounds."""
    kind: Any = GPT if isinstance(config, GPTConfig) else Llama
    model = kind(config, mesh, seed=1, fp32_residual=wide)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(((4 if p.dim() > 1 else 1) * p).bfloat16())
    return model.to(dtype)


# where it is fp32


def dtypes(model: Any) -> dict[str, set[torch.dtype]]:
    """What comes out of each kind of module in a forward and into it in backward, and what comes in."""
    seen: dict[str, set[torch.dtype]] = {}

    def see(use: str, *tensors: Any) -> None:
        seen.setdefault(use, set()).update(t.dtype for t in tensors if isinstance(t, Tensor))

    def watch(kind: str, module: nn.Module) -> None:
        def forward(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            see(f"{kind} gives", outputs[0])
            if kind == "block":
                see("block takes", inputs[0])
            if outputs[0].requires_grad:
                outputs[0].register_hook(lambda gradient: see(f"{kind} gets back", gradient))

        module.register_forward_hook(forward)

    watch("embedding", model.embedding)
    watch("last norm", model.norm)
    for block in model.blocks.values():
        for kind, module in (("block", block), ("attention", block.attention), ("down", block.mlp.down)):
            watch(kind, module)
        watch("norm", block.attention_norm)
        watch("norm", block.mlp_norm)
    tokens, targets = random_batch(101)
    model.loss(tokens, targets).backward()
    assert {p.grad.dtype for p in model.parameters()} == {model.norm.weight.dtype}
    return seen


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_stream_is_fp32_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    """Forward and backward; without the request all is narrow."""
    found = dtypes(build(MODELS[name], dtype, wide=True))
    stream = {"block takes", "block gives", "block gets back"}
    narrow = {f"{kind} {way}" for kind in ("embedding", "attention", "down", "norm", "last norm") for way in WAYS}
    assert found == {use: {FP32} for use in stream} | {use: {dtype} for use in narrow}
    assert dtypes(build(MODELS[name], dtype, wide=False)) == {use: {dtype} for use in stream | narrow}


WAYS = ("gives", "gets back")


def test_a_model_in_fp32_or_fp64_is_what_it_was() -> None:
    tokens, _ = random_batch(101)
    for dtype in (FP32, FP64):
        assert torch.equal(build(MODELS["llama"], dtype, True)(tokens), build(MODELS["llama"], dtype, False)(tokens))


# what it computes


def by_hand(model: Any, tokens: Tensor, dtype: torch.dtype, stream: torch.dtype) -> Tensor:
    """The GPT's logits from torch's functions, matmuls in one dtype and the residual stream in another."""
    p = {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}
    wide = torch.promote_types(dtype, FP32)

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = p[f"{name}.weight"].to(wide), p[f"{name}.bias"].to(wide)
        return F.layer_norm(x.to(wide), (32,), weight, bias, 1e-5).to(dtype)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    x = p["embedding.weight"][tokens].to(stream) + p["position.weight"][: tokens.shape[1]]
    for i in model.blocks:
        qkv = linear(f"blocks.{i}.attention.qkv", norm(f"blocks.{i}.attention_norm", x)).unflatten(-1, (4, 3, 8))
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(f"blocks.{i}.attention.out", attended)
        hidden = F.gelu(linear(f"blocks.{i}.mlp.up", norm(f"blocks.{i}.mlp_norm", x)), approximate="tanh")
        x = x + linear(f"blocks.{i}.mlp.down", hidden)
        assert x.dtype == stream
    return linear("head", norm("norm", x))


def error(x: Tensor, truth: Tensor) -> float:
    """Relative, by the norms."""
    return ((x[..., :101].double() - truth[..., :101]).norm() / truth[..., :101].norm()).item()


def test_it_computes_what_is_written_by_hand_and_is_nearer_the_truth() -> None:
    """Twelve blocks: the error in bf16, whose weights are exact, comes from the stream's rounding for the most part."""
    config, (tokens, _) = replace(MODELS["gpt"], num_layers=12), random_batch(101)
    truth = by_hand(build(config, FP64, False), tokens, FP64, FP64)
    found = {}
    with torch.no_grad():
        for wide in (True, False):
            model = build(config, BF16, wide)
            logits, hand = model(tokens), by_hand(model, tokens, BF16, FP32 if wide else BF16)
            assert error(logits, hand.double()) < 0.5 * error(hand, truth) + 1e-4
            found[wide] = error(logits, truth)
            assert found[wide] == pytest.approx(error(hand, truth), rel=0.15)
    assert found[True] < 0.6 * found[False], found


def test_a_stream_that_is_rounded_on_its_way_would_be_seen() -> None:
    """The control: fp32 that was bf16 between any two blocks is as far off as bf16."""
    config, (tokens, _) = replace(MODELS["gpt"], num_layers=12), random_batch(101)
    truth = by_hand(build(config, FP64, False), tokens, FP64, FP64)
    model = build(config, BF16, True)
    with torch.no_grad():
        right = error(model(tokens), truth)
        for block in model.blocks.values():
            block.register_forward_hook(lambda module, inputs, x: x.to(BF16).to(FP32))
        assert right < 0.75 * error(model(tokens), truth)


def wide_block(kind: str) -> Any:
    """fp32 blocks on an fp64 stream: the same code as bf16 on fp32, but precise enough to see any mistake."""

    def case(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
        found = evaluate(make(kind, mesh, FP32), noise("x", B, S, D), noise("dy", B, S, D), mesh)
        assert (found["y"].dtype, found["dx"].dtype) == (FP64, FP64)
        return found

    return on_layouts(case, "triton")  # its tolerance is fp32's


@pytest.mark.parametrize("kind", ["llama", "gpt"])
def test_blocks_on_a_wider_stream_are_plain_torch_s_at_any_layout(kind: str, ranks: Ranks) -> None:
    prove(ranks, wide_block, reference(kind), kind, backend="triton")


@interpreted
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_kernels_take_an_fp32_stream(name: str, options: dict[str, Any]) -> None:
    """Triton in its interpreter, which multiplies fp16 right: logits and gradients of the references, to fp16."""
    tokens, targets = random_batch(101)
    found = []
    for backend in ("torch", "triton"):
        model = build(replace(MODELS[name], num_layers=1, backend=backend, **options), FP16, wide=True)
        loss = model.loss(tokens, targets, key=Key(3))
        (1024 * loss).backward()
        found.append({"loss": loss.detach()} | {n: p.grad.double() for n, p in model.named_parameters()})
    for use, expected in found[0].items():
        scale = expected.abs().max()
        assert (found[1][use] - expected).abs().max() <= 0.01 * scale, use


# across ranks

Row = tuple[str, str, str, int, str]


def run(name: str, layout: Layout) -> dict[bool, tuple[list[Row], float, float]]:
    """On a rank: with the wide stream and without, the collectives of forward and backward, the loss, and how far the
    logits are from those in fp64."""
    mesh, (tokens, targets) = layout.mesh(), random_batch(101)
    truth = build(replace(MODELS[name], num_layers=12), FP64, False).full_logits(tokens)
    found = {}
    for wide in (True, False):
        model = build(replace(MODELS[name], num_layers=12), BF16, wide, mesh)
        with trace_communication() as trace:
            loss = model.loss(tokens, targets)
            loss.backward()
        rows = [(c.op, c.axis, c.phase, c.bytes, str(c.dtype)) for c in trace.calls]
        with torch.no_grad():
            found[wide] = rows, loss.item(), error(model.full_logits(tokens), truth)
    return found


@pytest.mark.parametrize("layout", [Layout(2), Layout(2, 1, True)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_sent_stays_narrow(name: str, layout: Layout, ranks: Ranks) -> None:
    """The same collectives, dtypes and bytes as without; the result is one process's, and nearer the truth."""
    (alone,) = ranks(run, 1, name, Layout(1))
    for found in ranks(run, 2, name, layout):
        assert found[True][0] == found[False][0]
        hidden = [row for row in found[True][0] if row[3] >= 4 * 8 * 32]
        assert len(hidden) >= 4 * 12
        assert {row[4] for row in hidden} == {"bfloat16"}
        assert found[True][1] == pytest.approx(alone[True][1], rel=2e-3)
        assert found[True][2] < 0.75 * found[False][2]


def test_the_trainer_s_flag_reaches_the_model() -> None:
    for wide in (True, False):
        for family in ("llama", "gpt"):
            settings = replace(config(family), parallel=ParallelConfig(precision="bf16", fp32_residual=wide))
            assert build_training(settings, Mesh(), 257).model.fp32_residual is wide
