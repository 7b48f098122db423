"""GPT-2's architecture (Radford et al. 2019): learned positions, LayerNorm, biases, GELU, tied embeddings."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpformer.layers.attention import AttentionConfig, SelfAttention
from tpformer.layers.block import DecoderBlock
from tpformer.layers.cache import KVCache
from tpformer.layers.dropout import check_dropout, residual_dropout
from tpformer.layers.embedding import PositionEmbedding, VocabParallelEmbedding, VocabParallelHead
from tpformer.layers.mlp import MLP
from tpformer.layers.norm import LayerNorm
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
class GPTConfig:
    """A GPT-2-like decoder. Raises ValueError for sizes that do not fit each other."""

    vocab_size: int = 50257
    """Tokens in the vocabulary; it is padded inside to a multiple of 128."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_layers: int = 12
    """Decoder blocks."""
    num_heads: int = 12
    """Attention heads; divisible by tp."""
    ffn_hidden_size: int | None = None
    """Inner width of the MLP, by default 4 hidden_size; divisible by tp."""
    max_seq_len: int = 1024
    """Longest sequence, in tokens: rows of the position table."""
    activation: str = "gelu_tanh"
    """Of the MLP: gelu, gelu_tanh or relu."""
    tie_embeddings: bool = True
    """The head uses the embedding's weight."""
    norm_eps: float = 1e-5
    """Added to the variance in LayerNorm."""
    dropout: float = 0.0
    """On the embedding and on what each block adds to the residual stream."""
    attention_dropout: float = 0.0
    """On the attention probabilities."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    backend: Backend = "auto"
    """Of the fused ops: triton, torch, or auto, which is mostly Triton on CUDA and torch elsewhere."""

    def __post_init__(self) -> None:
        divide(self.hidden_size, self.num_heads, "hidden_size", "num_heads")
        check_backend(self.backend)
        check_dropout(self.dropout)
        check_dropout(self.attention_dropout, "attention_dropout")

    @property
    def ffn_size(self) -> int:
        """Inner width of the MLP, as a plain int."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def attention(self) -> AttentionConfig:
        """The part that one attention block needs."""
        return AttentionConfig(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.hidden_size // self.num_heads,
            qkv_bias=True,
            out_bias=True,
            dropout=self.attention_dropout,
            backend=self.backend,
        )

    def num_parameters(self) -> int:
        """Parameters of the whole model, without vocabulary padding; tied embeddings count once."""
        d, f = self.hidden_size, self.ffn_size
        block = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * d + self.max_seq_len * d
        return self.num_layers * block + embeddings + 2 * d

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs of forward and backward for one token: 6 per matmul weight, and the whole attention square.

        The usual convention (arXiv 2204.02311, appendix B): causality and recomputation are not counted.
        """
        d = self.hidden_size
        matmul = self.num_layers * (4 * d * d + 2 * d * self.ffn_size) + self.vocab_size * d
        return 6 * matmul + 12 * self.num_layers * d * seq_len


class GPT(nn.Module):
    """GPT-2 decoder: tokens (b, s) -> this rank's slice of the logits (b, s, padded_vocab/tp).

    Parameter names and whole shapes do not depend on the layout, nor do the initial weights of one seed.
    part: the blocks and ends that this process has, if not all (pipelines). seed None leaves it on the meta device.
    fp32_residual: the residual stream is fp32 although the weights are bf16 or fp16.
    Raises ValueError for a config that the mesh cannot split.
    """

    def __init__(
        self,
        config: GPTConfig,
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
            self.position: Any = PositionEmbedding(c.max_seq_len, c.hidden_size, mesh=mesh) if part.first else None
            self.blocks = nn.ModuleDict({str(i): self._block() for i in part.layers})  # names are global
            if part.last:
                self.norm = LayerNorm(c.hidden_size, c.norm_eps, mesh=mesh, backend=c.backend)
            if part.last and not c.tie_embeddings:
                self.head = VocabParallelHead(c.hidden_size, c.vocab_size, mesh=mesh, backend=c.backend)
        if seed is not None:
            self.to_empty(device=mesh.device)
            init_weights(self, mesh, seed=seed, std=c.init_std, num_layers=c.num_layers)

    def _block(self) -> DecoderBlock:
        c, mesh = self.config, self.mesh
        return DecoderBlock(
            SelfAttention(c.attention, mesh=mesh),
            MLP(c.hidden_size, c.ffn_size, c.activation, mesh=mesh, backend=c.backend),
            LayerNorm(c.hidden_size, c.norm_eps, mesh=mesh, backend=c.backend),
            LayerNorm(c.hidden_size, c.norm_eps, mesh=mesh, backend=c.backend),
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
        x = self.position(embed_tokens(self, tokens), None if cache is None else cache.positions)
        return residual_dropout(x, None, c.dropout, key and key.fold("embedding"), self.mesh, backend=c.backend)

    def rope(self, x: Tensor, cache: KVCache | None = None) -> None:
        """None: positions are learned."""

    run_blocks = run_blocks
    hidden_states = hidden_states
    to_logits = to_logits
    full_logits = full_logits
    next_logits = next_logits
    last_logits = last_logits
    loss = loss
    head_loss = head_loss
    generate = generate
