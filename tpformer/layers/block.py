"""The decoder block: x + attention(norm(x)), then x + mlp(norm(x))."""

from torch import Tensor, nn

from tpformer.layers.cache import BlockCache
from tpformer.layers.dropout import residual_dropout
from tpformer.layers.mlp import MLP, GatedMLP
from tpformer.layers.norm import add_norm
from tpformer.mesh import Mesh
from tpformer.random import Key
from tpformer_kernels import Backend


class DecoderBlock(nn.Module):
    """Pre-norm residual block made of its four parts; x[B, S, D] -> y[B, S, D].

    One all-reduce forward and one backward in each of attention and mlp. The residual stream keeps the dtype of x:
    where it is wider than the weights (fp32, in a bf16 model), sums are made in it and only they; custom norms, too,
    must then give the weights' dtype.
    """

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        attention_norm: nn.Module,
        mlp_norm: nn.Module,
        *,
        dropout: float = 0.0,
        mesh: Mesh = Mesh(),
        backend: Backend = "auto",
    ):
        super().__init__()
        self.dropout, self.mesh, self.backend = dropout, mesh, backend
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        key: Key | None = None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """(b, s, d) -> (b, s, d), or (b, s/tp, d) both under sequence parallelism; a key switches dropout on.

        cache: the attention's, where it has one.
        """
        keys = [key.fold(use) if key else None for use in ("attention", "after attention", "after mlp")]
        cached = () if cache is None else (cache,)  # whoever brings an attention for training only need not know of it
        attended = self.attention(self.attention_norm(x), rope, keys[0], *cached)
        if key is None or self.dropout == 0:
            normed, x = add_norm(self.mlp_norm, attended, x)
            # theirs is added by the last matmul, where tp is 1; a hook is to see the output without it
            if type(self.mlp) in (MLP, GatedMLP) and not self.mlp._forward_hooks:
                return self.mlp(normed, x)
            return x + self.mlp(normed)
        x = self._drop_add(attended, x, keys[1])
        return self._drop_add(self.mlp(self.mlp_norm(x)), x, keys[2])

    def _drop_add(self, x: Tensor, residual: Tensor, key: Key | None) -> Tensor:
        return residual_dropout(x, residual, self.dropout, key, self.mesh, backend=self.backend)
