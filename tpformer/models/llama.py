"""The Llama family: Llama 1 to 3, Mistral, Qwen2 and Qwen3 are configs of it (arXiv 2302.13971, 2407.21783)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpformer.layers.attention import AttentionConfig, SelfAttention
from tpformer.layers.block import DecoderBlock
from tpformer.layers.cache import KVCache
from tpformer.layers.dropout import check_dropout, residual_dropout
from tpformer.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from tpformer.layers.mlp import GatedMLP
from tpformer.layers.norm import RMSNorm
from tpformer.layers.rope import RopeScaling, rope_table
from tpformer.mesh import Mesh, divide
from tpformer.models.decoder import (
    Part,
    check_length,
    embed_tokens,
    full_logits,
    head_loss,
    hidden_states,
    last_logits,
    loss,
    next_logits,
    run_blocks,
    tie_to_first,
    to_logits,
)
from tpformer.models.generate import generate
from tpformer.models.init import init_weights
from tpformer.random import Key
from tpformer_kernels import Backend, check_backend


@dataclass(frozen=True)
class LlamaConfig:
    """A Llama-like decoder. Mistral: sliding_window; Qwen2: qkv_bias; Qwen3: qk_norm and head_dim.

    Raises ValueError for sizes that do not fit each other.
    """

    vocab_size: int = 32000
    """Tokens in the vocabulary; it is padded inside to a multiple of 128."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    num_layers: int = 32
    """Decoder blocks."""
    num_heads: int = 32
    """Query heads; divisible by tp."""
    num_kv_heads: int | None = None
    """Key and value heads, by default num_heads; a divisor of num_heads."""
    head_dim: int | None = None
    """Width of a head, by default hidden_size / num_heads."""
    ffn_hidden_size: int = 11008
    """Inner width of the gated MLP; divisible by tp."""
    max_seq_len: int = 4096
    """Longest sequence, in tokens."""
    activation: str = "silu"
    """Of the MLP's gate: silu, gelu or gelu_tanh."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = RopeScaling()
    """How the rotary frequencies are stretched; not at all by default."""
    sliding_window: int | None = None
    """How many positions a token sees, itself included; all by default."""
    qkv_bias: bool = False
    """Biases on queries, keys and values."""
    out_bias: bool = False
    """A bias on the attention output."""
    qk_norm: bool = False
    """RMSNorm over each query and key head."""
    tie_embeddings: bool = False
    """The head uses the embedding's weight."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    dropout: float = 0.0
    """On the embedding and on what each block adds to the residual stream."""
    attention_dropout: float = 0.0
    """On the attention probabilities."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    backend: Backend = "auto"
    """Of the fused ops: triton, torch, or auto, which is mostly Triton on CUDA and torch elsewhere."""

    def __post_init__(self) -> None:
        if self.head_dim is None:
            divide(self.hidden_size, self.num_heads, "hidden_size", "num_heads")
        divide(self.num_heads, self.kv_heads, "num_heads", "num_kv_heads")
        if self.attention.head_dim % 2:
            raise ValueError(f"head_dim ({self.attention.head_dim}) must be even for rotary positions")
        check_backend(self.backend)
        check_dropout(self.dropout)
        check_dropout(self.attention_dropout, "attention_dropout")

    @property
    def kv_heads(self) -> int:
        """Key and value heads, as a plain int."""
        return self.num_kv_heads or self.num_heads

    @property
    def attention(self) -> AttentionConfig:
        """The part that one attention block needs."""
        return AttentionConfig(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_heads,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            qk_norm=self.qk_norm,
            sliding_window=self.sliding_window,
            dropout=self.attention_dropout,
            norm_eps=self.norm_eps,
            backend=self.backend,
        )

    def num_parameters(self) -> int:
        """Parameters of the whole model, without vocabulary padding; tied embeddings count once."""
        d, a = self.hidden_size, self.attention
        q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        attention = d * (q + 2 * kv) + q * d + self.qkv_bias * (q + 2 * kv) + self.out_bias * d
        block = attention + 3 * d * self.ffn_hidden_size + 2 * d + self.qk_norm * 2 * a.head_dim
        return self.num_layers * block + (1 if self.tie_embeddings else 2) * self.vocab_size * d + d

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs of forward and backward for one token: 6 per matmul weight, and the whole attention square.

        The usual convention (arXiv 2204.02311, appendix B): causality and recomputation are not counted.
        """
        d, a = self.hidden_size, self.attention
        attention = 2 * d * (a.num_heads + a.num_kv_heads) * a.head_dim
        matmul = self.num_layers * (attention + 3 * d * self.ffn_hidden_size) + self.vocab_size * d
        return 6 * matmul + 12 * self.num_layers * a.num_heads * a.head_dim * seq_len


class Llama(nn.Module):
    """Llama decoder: tokens (b, s) -> this rank's slice of the logits (b, s, padded_vocab/tp).

    Parameter names and whole shapes do not depend on the layout, nor do the initial weights of one seed.
    part: the blocks and ends that this process has, if not all (pipelines). seed None leaves it on the meta device.
    fp32_residual: the residual stream is fp32 although the weights are bf16 or fp16.
    Raises ValueError for a config that the mesh cannot split.
    """

    def __init__(
        self,
        config: LlamaConfig,
        mesh: Mesh = Mesh(),
        *,
        seed: int | None = 0,
        part: Part | None = None,
        fp32_residual: bool = False,
    ):
        super().__init__()
        self.config, self.mesh, self.fp32_residual = config, mesh, fp32_residual
        c, part = config, part or Part.whole(config.num_layers)
        with torch.device("meta"):
            self.embedding: Any = None
            self.norm: Any = None
            self.head: Any = None
            if part.first or (part.last and c.tie_embeddings):
                embedding = VocabParallelEmbedding(c.vocab_size, c.hidden_size, mesh=mesh)
                self.embedding = tie_to_first(part, embedding)
            self.blocks = nn.ModuleDict({str(i): self._block() for i in part.layers})  # names are global
            if part.last:
                self.norm = RMSNorm(c.hidden_size, c.norm_eps, mesh=mesh, backend=c.backend)
            if part.last and not c.tie_embeddings:
                self.head = VocabParallelHead(c.hidden_size, c.vocab_size, mesh=mesh, backend=c.backend)
        if seed is not None:
            self.to_empty(device=mesh.device)
            init_weights(self, mesh, seed=seed, std=c.init_std, num_layers=c.num_layers)

    def _block(self) -> DecoderBlock:
        c, mesh = self.config, self.mesh
        return DecoderBlock(
            SelfAttention(c.attention, mesh=mesh),
            GatedMLP(c.hidden_size, c.ffn_hidden_size, c.activation, mesh=mesh, backend=c.backend),
            RMSNorm(c.hidden_size, c.norm_eps, mesh=mesh, backend=c.backend),
            RMSNorm(c.hidden_size, c.norm_eps, mesh=mesh, backend=c.backend),
            dropout=c.dropout,
            mesh=mesh,
            backend=c.backend,
        )

    def forward(self, tokens: Tensor, *, key: Key | None = None) -> Tensor:
        """int64 (b, s) -> this rank's logits (b, s, padded_vocab/tp); a key switches dropout on."""
        return self.to_logits(self.hidden_states(tokens, key=key))

    def embed(self, tokens: Tensor, key: Key | None = None, cache: KVCache | None = None) -> Tensor:
        """int64 (b, s) -> what the first block reads, (b, s, d) or, under sequence parallelism, (b, s/tp, d)."""
        c = self.config
        check_length(tokens, c.max_seq_len)
        x = embed_tokens(self, tokens)
        return residual_dropout(x, None, c.dropout, key and key.fold("embedding"), self.mesh, backend=c.backend)

    def rope(self, x: Tensor, cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        """The rotations of every position of x (b, s, d) or (b, s/tp, d), or of the positions that a cache is at."""
        c = self.config
        if cache is None:
            length = x.shape[1] * (self.mesh.tp.size if self.mesh.sequence_parallel else 1)
            return rope_table(length, c.attention.head_dim, c.rope_theta, c.rope_scaling, like=x)
        if cache.rope is None:
            cache.rope = rope_table(cache.length, c.attention.head_dim, c.rope_theta, c.rope_scaling, like=x)
        cos, sin = cache.rope
        return cos[cache.positions], sin[cache.positions]

    run_blocks = run_blocks
    hidden_states = hidden_states
    to_logits = to_logits
    full_logits = full_logits
    next_logits = next_logits
    last_logits = last_logits
    loss = loss
    head_loss = head_loss
    generate = generate
