"""Self-attention with its heads split over tp: heads never talk to each other, so nothing is communicated inside."""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from tpformer.layers.cache import BlockCache
from tpformer.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpformer.layers.norm import RMSNorm
from tpformer.mesh import Axis, Mesh, divide
from tpformer.placement import Piece, Placement
from tpformer.random import Key
from tpformer_kernels import AttentionOptions, Backend, apply_rope, attention, split_and_rotate


@dataclass(frozen=True)
class AttentionConfig:
    """The sizes and options of one attention block, for the whole of it."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    causal: bool = True
    dropout: float = 0.0
    norm_eps: float = 1e-5
    backend: Backend = "auto"


class SelfAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245); each tp rank owns num_heads/tp query heads.

    x[B, S, D] -> q[B, S, H_tp, K], k, v[B, S, KV_tp, K] -> y[B, S, D]. With fewer KV heads than ranks, each
    rank keeps a copy of the one that its queries need, and the copies' gradients are summed once a step.
    Raises ValueError if the heads do not divide among the ranks, or for a window below 1.
    """

    def __init__(self, config: AttentionConfig, *, mesh: Mesh = Mesh()):
        super().__init__()
        self.config, self.mesh = config, mesh
        c = config
        if c.sliding_window is not None and c.sliding_window < 1:
            raise ValueError(f"sliding_window ({c.sliding_window}) must be at least 1")
        rows = qkv_rows(c, mesh.tp)
        self.local_heads = c.num_heads // mesh.tp.size
        self.local_kv_heads = max(1, c.num_kv_heads // mesh.tp.size)
        self.qkv = ColumnParallelLinear(
            c.hidden_size, rows.shape[0], c.qkv_bias, mesh=mesh, rows=rows, backend=c.backend
        )
        self.out = RowParallelLinear(c.num_heads * c.head_dim, c.hidden_size, c.out_bias, mesh=mesh, backend=c.backend)
        self.core = AttentionCore(c, self.local_heads, mesh=mesh)
        if c.qk_norm:  # shared by heads that lie on different ranks
            self.q_norm = self._head_norm()
            self.k_norm = self._head_norm()

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        key: Key | None = None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """(b, s, d) -> (b, s, d), or (b, s/tp, d) both under sequence parallelism; a key switches dropout on.

        cache: what it holds is attended to as well, and x's keys and values are added to it; not under sequence
        parallelism.
        """
        q, k, v = (y.transpose(1, 2) for y in self._heads(x, rope))
        if cache is None:
            y = self.core(q, k, v, key)  # (b, heads/tp, s, head_dim)
        else:
            k, v, seen = cache.extend(k, v, self.config.sliding_window)
            y = self.core(q, k, v, key, seen)
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """q (b, s, heads/tp, head_dim), k and v (b, s, kv_heads/tp, head_dim), rotated."""
        if rope is not None and rope[0].dim() == 4:  # each row at positions of its own: as one row of all tokens
            cos, sin = (table.flatten(0, 1) for table in rope)
            return tuple(y[0].unflatten(0, x.shape[:2]) for y in self._heads(x.flatten(0, 1)[None], (cos, sin)))
        c = self.config
        group = self.local_heads // self.local_kv_heads  # query heads to a KV head
        qkv = self.qkv(x).unflatten(-1, (self.local_kv_heads, group + 2, c.head_dim))
        if rope is not None and not c.qk_norm:
            return split_and_rotate(qkv, *rope, backend=c.backend)
        q = qkv[..., :group, :].flatten(2, 3)
        k, v = qkv[..., group, :], qkv[..., group + 1, :]
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, k, *rope, backend=c.backend)
        return q, k, v

    def _head_norm(self) -> RMSNorm:
        c = self.config
        return RMSNorm(c.head_dim, c.norm_eps, mesh=self.mesh, partial_gradient=True, backend=c.backend)


class AttentionCore(nn.Module):
    """softmax(q kᵀ / sqrt(head_dim)) v of this rank's heads; without parameters, a module so that it has a name.

    Recomputation asks for it by that name (arXiv 2205.05198, section 5).
    """

    def __init__(self, config: AttentionConfig, local_heads: int, *, mesh: Mesh = Mesh()):
        super().__init__()
        self.config, self.local_heads, self.mesh = config, local_heads, mesh

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key: Key | None = None, seen: Tensor | None = None) -> Tensor:
        """q (b, heads/tp, s, head_dim), k and v (b, kv_heads/tp, s, head_dim) -> (b, heads/tp, s, head_dim).

        seen: bool (b, s), False for keys that are padding. Of more keys than queries there is one query, the last,
        and it sees all of them that are no padding.
        """
        if q.shape[2] < k.shape[2]:
            mask = None if seen is None else seen[:, None, None]
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        c = self.config
        options = AttentionOptions(causal=c.causal, window=c.sliding_window)
        if key is not None and c.dropout:
            place = (key.seed, key.sample, self.mesh.tp.rank * self.local_heads)
            options = replace(options, dropout=c.dropout, place=place)
        return attention(q, k, v, options, key_mask=seen, backend=c.backend)


def qkv_rows(config: AttentionConfig, tp: Axis) -> Placement:
    """Where a rank's rows of the fused q|k|v weight lie: grouped per KV head, '(kv (group + 2) head_dim) d'.

    A contiguous split is right for any tp up to the number of KV heads; beyond, a rank has part of one
    group's queries and a copy of its key and value rows.
    """
    c = config
    divide(c.num_heads, tp.size, "num_heads")
    group = divide(c.num_heads, c.num_kv_heads, "num_heads", "num_kv_heads")
    whole = (c.num_kv_heads * (group + 2) * c.head_dim, c.hidden_size)
    if c.num_kv_heads >= tp.size:
        size = divide(c.num_kv_heads, tp.size, "num_kv_heads") * (group + 2) * c.head_dim
        return Placement(whole, 0, (Piece(tp.rank * size, size),))
    copies = divide(tp.size, c.num_kv_heads, "tp", "num_kv_heads")
    kv_head, copy = divmod(tp.rank, copies)
    start = kv_head * (group + 2) * c.head_dim
    size = divide(group, copies, "query heads of a KV head", "ranks that share it") * c.head_dim
    queries = Piece(start + copy * size, size)
    keys_and_values = Piece(start + group * c.head_dim, 2 * c.head_dim, copies, copy)
    return Placement(whole, 0, (queries, keys_and_values), partial=True)
