"""Transformers' models as oracles: their weights (and, the map being linear, their gradients) in our layout.

Our fused rows: q|k|v per KV head, '(kv (group + 2) head_dim) d'; gate and up interleaved, '(f two) d'.
Nothing here imports transformers: the ranks, which load this file too, have no use for it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import tpformer
from tests.proofs.cases import Config, Layout, Measured, build, measure_model, random_batch
from tpformer import GPTConfig, LlamaConfig, Mesh

State = dict[str, Tensor]
Arrays = dict[str, np.ndarray]


def llama_state(theirs: State, config: LlamaConfig) -> State:
    """The weights or gradients of transformers' Llama, Mistral, Qwen2 or Qwen3, by our names and in our layout."""
    ours = {"embedding.weight": theirs["model.embed_tokens.weight"], "norm.weight": theirs["model.norm.weight"]}
    if not config.tie_embeddings:
        ours["head.weight"] = theirs["lm_head.weight"]
    for layer in range(config.num_layers):
        old, new = f"model.layers.{layer}", f"blocks.{layer}"
        for kind in ("weight", "bias"):
            q, k, v = (theirs.get(f"{old}.self_attn.{x}_proj.{kind}") for x in "qkv")
            if q is not None and k is not None and v is not None:
                ours[f"{new}.attention.qkv.{kind}"] = fuse_qkv(q, k, v, config.kv_heads, config.attention.head_dim)
        gate, up = (theirs[f"{old}.mlp.{x}_proj.weight"] for x in ("gate", "up"))
        ours[f"{new}.mlp.gate_up.weight"] = rearrange([gate, up], "two f d -> (f two) d")
        for theirs_name, our_name in {
            "self_attn.o_proj.weight": "attention.out.weight",
            "self_attn.o_proj.bias": "attention.out.bias",
            "self_attn.q_norm.weight": "attention.q_norm.weight",
            "self_attn.k_norm.weight": "attention.k_norm.weight",
            "mlp.down_proj.weight": "mlp.down.weight",
            "input_layernorm.weight": "attention_norm.weight",
            "post_attention_layernorm.weight": "mlp_norm.weight",
        }.items():
            if f"{old}.{theirs_name}" in theirs:
                ours[f"{new}.{our_name}"] = theirs[f"{old}.{theirs_name}"]
    return ours


def gpt_state(theirs: State, config: GPTConfig) -> State:
    """The weights or gradients of transformers' GPT-2; its Conv1D weights are (in, out), c_attn is q|k|v blocks."""
    ours = {
        "embedding.weight": theirs["transformer.wte.weight"],
        "position.weight": theirs["transformer.wpe.weight"],
        "norm.weight": theirs["transformer.ln_f.weight"],
        "norm.bias": theirs["transformer.ln_f.bias"],
    }
    if not config.tie_embeddings:
        ours["head.weight"] = theirs["lm_head.weight"]
    for layer in range(config.num_layers):
        for theirs_name, our_name in {
            "attn.c_attn": "attention.qkv",
            "attn.c_proj": "attention.out",
            "mlp.c_fc": "mlp.up",
            "mlp.c_proj": "mlp.down",
            "ln_1": "attention_norm",
            "ln_2": "mlp_norm",
        }.items():
            for kind in ("weight", "bias"):
                x = theirs[f"transformer.h.{layer}.{theirs_name}.{kind}"]
                x = x.T if x.dim() == 2 else x
                if our_name == "attention.qkv":
                    q, k, v = x.chunk(3)
                    x = fuse_qkv(q, k, v, config.num_heads, config.hidden_size // config.num_heads)
                ours[f"blocks.{layer}.{our_name}.{kind}"] = x
    return ours


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """Rows (or biases) of queries, keys and values, grouped per KV head."""
    q = rearrange(q, "(kv group k) ... -> kv group k ...", kv=kv_heads, k=head_dim)
    k, v = (rearrange(x, "(kv k) ... -> kv 1 k ...", kv=kv_heads) for x in (k, v))
    return rearrange(torch.cat([q, k, v], dim=1), "kv heads k ... -> (kv heads k) ...")


def randomise(model: Any) -> None:
    """Give every parameter of an oracle random values, norms about 1 and all else about 0, none of them special."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            mean = 1.0 if ("norm" in name or "ln_" in name) and name.endswith("weight") else 0.0
            p.copy_(mean + 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))


def in_double(model: Any) -> Any:
    """The oracle in fp64; its RMSNorms, which always round to fp32, give way to torch.nn's with their weights."""
    model.double()
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if type(norm).__name__.endswith("RMSNorm"):
                exact = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64)
                exact.weight = norm.weight
                setattr(parent, name, exact)
    return model


def measure_oracle(model: Any, state_of: Callable[[State], State], vocab_size: int) -> Measured:
    """Logits, loss and gradients of an oracle; the loss is its own in fp32 (it rounds to fp32), torch's in fp64."""
    tokens, targets = random_batch(vocab_size)
    model.train()
    out = model(tokens, labels=targets, shift_labels=targets)
    own = out.logits.dtype == torch.float32
    loss = out.loss if own else F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
    loss.backward()
    found = state_of({name: p.grad for name, p in model.named_parameters()})
    return {name: x.detach().numpy() for name, x in (found | {"loss": loss, "logits": out.logits}).items()}


def arrays(state: State) -> Arrays:
    """What crosses a pipe to the ranks."""
    return {name: np.ascontiguousarray(x.detach().numpy()) for name, x in state.items()}


def measure_ours(config: Config, state: Arrays, layout: Layout | None = None) -> Measured:
    """On a rank, or without a layout on one process: our model with the oracle's weights."""
    model = build(config, layout.mesh() if layout else Mesh())
    model.to(torch.from_numpy(state["norm.weight"]).dtype)
    tpformer.load_full_state(model, {name: torch.from_numpy(x) for name, x in state.items()})
    return measure_model(model)
