"""A Llama in plain PyTorch on one process: what tensor parallelism is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from benchmarks.peers.step import Step, check_world, dtype_of, gemm_backend

__all__ = ["AXIS", "NAME", "build", "gemm_backend", "version"]

NAME = "plain PyTorch"
AXIS: Literal["tp", "dp"] = "tp"


@dataclass(frozen=True)
class PlainLlamaConfig:
    """The shape of a Llama; the fields are named as in tpformer's `LlamaConfig`."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    max_seq_len: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


def rope_table(config: PlainLlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (max_seq_len, 1, head_dim/2), for Hugging Face's rotate-half convention."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(config.max_seq_len).float(), config.rope_theta**-exponents)
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head against each other; x is (b, s, heads, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions.

    `enable_gqa` is the faster form on CPU: flash kernel, and no expanded copy of K and V (2-4 % less time
    than repeat_interleave, half the time of the unfused math).
    """

    def __init__(self, config: PlainLlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(b, s, d) -> (b, s, d)."""
        # The number of heads is left to the weights, which DTensor may cut: (b, s, heads/tp, head_dim).
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """The gated feed-forward part (SwiGLU)."""

    def __init__(self, config: PlainLlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, d) -> (b, s, d)."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """One decoder layer: attention, then MLP, each behind a norm and beside a residual."""

    def __init__(self, config: PlainLlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(b, s, d) -> (b, s, d)."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class PlainLlama(nn.Module):
    """A decoder-only Llama with an untied head."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: PlainLlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (b, s) -> logits (b, s, vocab_size)."""
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per token; both arguments are (b, s), targets of -100 are left out."""
        logits = self(tokens).flatten(0, 1)
        # As everyone does: in bf16 the logarithm of the softmax would be off by up to 0.03. In fp32 it is no copy.
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten())


def from_tpformer(config: PlainLlamaConfig, full: dict[str, Tensor]) -> dict[str, Tensor]:
    """tpformer's whole tensors, under its names, as the plain model's: q, k, v, gate and up taken apart."""
    per_kv = config.num_heads // config.num_kv_heads
    state: dict[str, Tensor] = {}
    for name, tensor in full.items():
        if name.endswith("attention.qkv.weight"):
            # Each KV head's rows stand together: its q heads, then k, then v.
            groups = rearrange(tensor, "(kv n e) d -> kv n e d", n=per_kv + 2, e=config.head_dim)
            parts = (groups[:, :per_kv], groups[:, per_kv : per_kv + 1], groups[:, per_kv + 1 :])
            for letter, part in zip("qkv", parts, strict=True):
                state[name.replace("qkv", letter)] = rearrange(part, "kv n e d -> (kv n e) d")
        elif name.endswith("mlp.gate_up.weight"):
            # Rows alternate: gate 0, up 0, gate 1, up 1, ...
            state[name.replace("gate_up", "gate")] = tensor[0::2]
            state[name.replace("gate_up", "up")] = tensor[1::2]
        else:
            state[name] = tensor
    return state


def load_from_tpformer(model: PlainLlama, full: dict[str, Tensor]) -> None:
    """Copy tpformer's whole tensors, under its names, into `model`; raises RuntimeError if names differ."""
    model.load_state_dict(from_tpformer(model.config, full))


def version() -> str:
    """torch's."""
    return torch.__version__


def with_weights(shape: PlainLlamaConfig, device: torch.device, weights: dict[str, Tensor]) -> PlainLlama:
    """The plain model on a device, with tpformer's whole tensors and in their dtype."""
    with torch.device(device):
        model = PlainLlama(shape)
    model.to(dtype_of(weights))
    load_from_tpformer(model, weights)
    return model


def build(shape: PlainLlamaConfig, degree: int, device: torch.device, weights: dict[str, Tensor]) -> Step:
    """The step of one process; raises ValueError for any degree but 1."""
    check_world(NAME, degree)
    if degree != 1:
        raise ValueError(f"{NAME} is one process, not {degree}")
    model = with_weights(shape, device, weights)

    def forward_backward(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = model.loss(tokens, targets)
        loss.backward()
        return loss.detach()

    def gradients() -> dict[str, Tensor]:
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    return Step(model, forward_backward, gradients)
