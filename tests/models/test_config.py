"""Configs: their counts are the real ones, and sizes that do not fit are refused with both numbers in the text."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tpformer
from tests.distributed import Ranks
from tests.proofs.cases import VARIANTS, Config, Layout, build, gpt, llama
from tpformer import GPT, GPTConfig, Key, Llama, LlamaConfig, Mesh


@pytest.mark.parametrize("variant", VARIANTS)
def test_num_parameters_is_the_real_count(variant: str, ranks: Ranks) -> None:
    config = VARIANTS[variant]
    model = build(config)
    padding = -config.vocab_size % 128 * config.hidden_size * (1 if config.tie_embeddings else 2)
    assert config.num_parameters() == sum(p.numel() for p in model.parameters()) - padding
    assert sum(ranks(unique_parameters, 4, variant)) == config.num_parameters()


def unique_parameters(variant: str) -> int:
    """On a rank of four: numbers of which this rank holds copy 0."""
    mesh = Layout(4).mesh()
    model = build(VARIANTS[variant], mesh)
    return sum(
        model.get_parameter(name)[ours].numel()
        for name, placement in tpformer.placements(model, mesh).items()
        for piece, _, ours in placement.slices()
        if piece.copy == 0
    )


def test_published_sizes() -> None:
    """The defaults are GPT-2 small and Llama 1/2 7B; Llama 3 8B, Mistral 7B, Qwen2 0.5B and Qwen3 0.6B as published."""
    assert GPTConfig().num_parameters() == 124_439_808
    assert LlamaConfig().num_parameters() == 6_738_415_616
    wide = {"num_kv_heads": 8, "ffn_hidden_size": 14336}
    assert LlamaConfig(vocab_size=128256, **wide).num_parameters() == 8_030_261_248  # type: ignore[arg-type]
    assert LlamaConfig(**wide).num_parameters() == 7_241_732_096  # type: ignore[arg-type]
    small = {"vocab_size": 151936, "tie_embeddings": True}
    qwen2 = {
        "hidden_size": 896,
        "num_layers": 24,
        "num_heads": 14,
        "num_kv_heads": 2,
        "ffn_hidden_size": 4864,
        "qkv_bias": True,
    }
    assert LlamaConfig(**(small | qwen2)).num_parameters() == 494_032_768  # type: ignore[arg-type]
    qwen3 = {
        "hidden_size": 1024,
        "num_layers": 28,
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 128,
        "ffn_hidden_size": 3072,
    }
    assert LlamaConfig(**(small | qwen3), qk_norm=True).num_parameters() == 596_049_920  # type: ignore[arg-type]


FLOPS: dict[str, Config] = {
    "gpt": gpt(vocab_size=128),
    "gpt-untied-narrow": gpt(vocab_size=128, tie_embeddings=False, ffn_hidden_size=40),
    "llama-kv2": llama(vocab_size=128, num_kv_heads=2),
    "qwen3-tied": llama(vocab_size=128, num_kv_heads=1, qk_norm=True, head_dim=12, tie_embeddings=True),
    "qwen2": llama(vocab_size=128, qkv_bias=True, out_bias=True),
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops_per_token_is_what_torch_counts(name: str) -> None:
    """Forward and backward of the whole attention square: exact, the vocabulary being without padding here.

    The counter does not know torch's fused CPU attention, so attention dropout takes the model through plain
    matmuls; and it does not know in-place addmm, of which GatedMLP's backward has one.
    """
    config = replace(FLOPS[name], attention_dropout=0.1)
    model, (b, s) = build(config), (2, 8)
    tokens = torch.randint(config.vocab_size, (b, s))
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        model.loss(tokens, tokens, key=Key(0)).backward()
    assert config.flops_per_token(s) * b * s == counter.get_total_flops()


def addmm_flops(self_shape: Any, a_shape: Any, b_shape: Any, out_shape: Any = None, **_: Any) -> int:
    """Of out += a b."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


def test_flops_per_token_by_hand() -> None:
    """GPT-2 small at 1024: per layer 12 d² weights, the head, and 12 d s for each layer's attention."""
    d = 768
    assert GPTConfig().flops_per_token(1024) == 6 * (12 * 12 * d * d + 50257 * d) + 12 * 12 * d * 1024


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "heads": (lambda: GPTConfig(hidden_size=64, num_heads=5), r"hidden_size \(64\).*num_heads \(5\)"),
    "llama heads": (lambda: llama(hidden_size=64, num_heads=5), r"hidden_size \(64\).*num_heads \(5\)"),
    "kv heads": (lambda: llama(num_heads=4, num_kv_heads=3), r"num_heads \(4\).*num_kv_heads \(3\)"),
    "more kv heads": (lambda: llama(num_heads=4, num_kv_heads=8), r"num_heads \(4\).*num_kv_heads \(8\)"),
    "odd head": (lambda: llama(head_dim=7), r"head_dim \(7\) must be even"),
    "odd head by division": (lambda: llama(hidden_size=28, num_heads=4), r"head_dim \(7\) must be even"),
    "dropout": (lambda: llama(dropout=1.0), r"^dropout \(1.0\) must be at least 0 and below 1"),
    "negative dropout": (lambda: gpt(dropout=-0.1), r"^dropout \(-0.1\) must be at least 0 and below 1"),
    "attention dropout": (lambda: gpt(attention_dropout=1.0), r"attention_dropout \(1.0\)"),
    "llama attention dropout": (lambda: llama(attention_dropout=1.5), r"attention_dropout \(1.5\)"),
    "activation": (lambda: GPT(gpt(activation="swish")), r"'swish'.*gelu, gelu_tanh, relu"),
    "gate": (lambda: Llama(llama(activation="relu")), r"'relu'.*silu, gelu, gelu_tanh"),
    "window": (lambda: Llama(llama(sliding_window=0)), r"sliding_window \(0\) must be at least 1"),
    "rope kind": (lambda: tpformer.RopeScaling("ntk", 2.0), r"'ntk'.*linear, llama3 or yarn"),  # type: ignore[arg-type]
    "rope factor": (lambda: tpformer.RopeScaling("linear", 0.5), r"factor \(0.5\) must be at least 1"),
    "long": (lambda: GPT(gpt())(torch.zeros(1, 13, dtype=torch.int64)), r"\(1, 13\).*max_seq_len \(12\)"),
    "flat": (lambda: Llama(llama())(torch.zeros(5, dtype=torch.int64)), r"tokens \(5,\) must be \(batch, length\)"),
    "token": (lambda: GPT(gpt())(torch.tensor([[0, 101]])), r"token 101 must be in 0..100 \(vocab_size 101\)"),
    "target": (lambda: Llama(llama()).loss(*torch.tensor([[[0]], [[101]]])), r"target 101 .*0..100 \(vocab_size 101\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_sizes_that_do_not_fit_are_refused_with_their_numbers(name: str) -> None:
    make, text = BAD[name]
    with pytest.raises(ValueError, match=text):
        make()


def at_tp_4(config: Config) -> str:
    """On a rank of four: what building the model, or one forward with sequence parallelism, is refused with."""
    try:
        model = build(config, Mesh.create(tp=4, sequence_parallel=True, device="cpu"))
        model(torch.zeros(1, 6, dtype=torch.int64))
    except ValueError as error:
        return str(error)
    return "nothing was wrong"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (gpt(hidden_size=60, num_heads=30), r"num_heads \(30\) must be divisible by tp \(4\)"),
        (llama(hidden_size=60, num_heads=30), r"num_heads \(30\) must be divisible by tp \(4\)"),
        (llama(hidden_size=48, num_heads=12, num_kv_heads=6), r"num_kv_heads \(6\) must be divisible by tp \(4\)"),
        (llama(hidden_size=48, num_heads=12, num_kv_heads=3), r"tp \(4\) must be divisible by num_kv_heads \(3\)"),
        (gpt(ffn_hidden_size=42), r"ffn_hidden_size \(42\) must be divisible by tp \(4\)"),
        (llama(ffn_hidden_size=42), r"ffn_hidden_size \(42\) must be divisible by tp \(4\)"),
        (llama(), r"sequence length \(6\) must be divisible by tp \(4\)"),
    ],
    ids=lambda x: re.sub(r"\W+", " ", x) if isinstance(x, str) else "",
)
def test_what_the_mesh_cannot_split_is_refused_on_every_rank(config: Config, text: str, ranks: Ranks) -> None:
    for message in ranks(at_tp_4, 4, config):
        assert re.search(text, message), message
