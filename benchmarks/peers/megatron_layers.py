"""The plain Llama on megatron-core's parallel layers and loss, with torch's attention: what its users could build."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.megatron import initialize, step_of, transformer_config, version
from benchmarks.peers.plain import PlainLlamaConfig, rope_table, rotate
from benchmarks.peers.step import Step, check_world, dtype_of, gemm_backend

__all__ = ["AXIS", "NAME", "build", "gemm_backend", "version"]

NAME = "megatron-core layers"
AXIS: Literal["tp", "dp"] = "tp"


def column(config: Any, size_in: int, size_out: int) -> nn.Module:
    """Megatron's ColumnParallelLinear, its output left cut."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    layer: nn.Module = ColumnParallelLinear(size_in, size_out, config=config, init_method=nn.init.zeros_, bias=False)
    return layer


def row(config: Any, size_in: int, size_out: int) -> nn.Module:
    """Megatron's RowParallelLinear, of inputs that are cut."""
    from megatron.core.tensor_parallel import RowParallelLinear

    layer: nn.Module = RowParallelLinear(
        size_in,
        size_out,
        config=config,
        init_method=nn.init.zeros_,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
    )
    return layer


class Attention(nn.Module):
    """Causal grouped-query attention of this rank's heads; q, k and v are one matrix, grouped by KV head."""

    def __init__(self, shape: PlainLlamaConfig, config: Any) -> None:
        super().__init__()
        self.head_dim, self.per_kv = shape.head_dim, shape.num_heads // shape.num_kv_heads
        rows = shape.head_dim * (shape.num_heads + 2 * shape.num_kv_heads)
        self.qkv = column(config, shape.hidden_size, rows)
        self.out = row(config, shape.hidden_size, shape.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(b, s, d) -> (b, s, d)."""
        groups = self.qkv(x)[0].unflatten(-1, (-1, self.per_kv + 2, self.head_dim))  # (b, s, kv_heads/tp, n + 2, e)
        q, k, v = groups.split((self.per_kv, 1, 1), dim=-2)
        q, k = rotate(q.flatten(2, 3), cos, sin), rotate(k.flatten(2, 3), cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v.flatten(2, 3)))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))[0]
        return out


class MLP(nn.Module):
    """The gated feed-forward part (SwiGLU); gate and up are one matrix, each rank's gates above its ups."""

    def __init__(self, shape: PlainLlamaConfig, config: Any) -> None:
        super().__init__()
        self.gate_up = column(config, shape.hidden_size, 2 * shape.ffn_hidden_size)
        self.down = row(config, shape.ffn_hidden_size, shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, d) -> (b, s, d)."""
        gate, up = self.gate_up(x)[0].chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)[0]
        return out


class Block(nn.Module):
    """One decoder layer: attention, then MLP, each behind a norm and beside a residual."""

    def __init__(self, shape: PlainLlamaConfig, config: Any) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.attention = Attention(shape, config)
        self.mlp_norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.mlp = MLP(shape, config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(b, s, d) -> (b, s, d)."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class LayersLlama(nn.Module):
    """A decoder-only Llama with an untied head; its parameters have tpformer's names."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: PlainLlamaConfig, config: Any) -> None:
        super().__init__()
        from megatron.core.tensor_parallel import VocabParallelEmbedding

        self.embedding = VocabParallelEmbedding(
            shape.vocab_size, shape.hidden_size, init_method=nn.init.zeros_, config=config
        )
        self.blocks = nn.ModuleList(Block(shape, config) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.head = column(config, shape.hidden_size, shape.vocab_size)
        cos, sin = rope_table(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per token; both arguments are (b, s)."""
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        losses: Tensor = vocab_parallel_cross_entropy(self.head(self.norm(x))[0], targets)
        return losses.mean()


def build(shape: PlainLlamaConfig, degree: int, device: torch.device, weights: dict[str, Tensor]) -> Step:
    """The step of a Llama built on the layers, cut over `degree` ranks."""
    version()
    check_world(NAME, degree)
    initialize(degree, device)
    dtype = dtype_of(weights)
    model = LayersLlama(shape, transformer_config(shape, degree, dtype)).to(device, dtype)
    return step_of(model, model.loss, weights, shape, str)
