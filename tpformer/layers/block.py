"""The decoder block: x + attention(norm(x)), then x + mlp(norm(x))."""

from torch import Tensor, nn

from tpformer.layers.dropout import residual_dropout
from tpformer.mesh import Mesh
from tpformer.random import Key


class DecoderBlock(nn.Module):
    """Pre-norm residual block made of its four parts; x[B, S, D] -> y[B, S, D].

    One all-reduce forward and one backward in each of attention and mlp.
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
    ):
        super().__init__()
        self.dropout, self.mesh = dropout, mesh
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, key: Key | None = None) -> Tensor:
        """(b, s, d) -> (b, s, d), or (b, s/tp, d) both under sequence parallelism; a key switches dropout on."""
        keys = [key.fold(use) if key else None for use in ("attention", "after attention", "after mlp")]
        attended = self.attention(self.attention_norm(x), rope, keys[0])
        x = x + residual_dropout(attended, self.dropout, keys[1], self.mesh)
        return x + residual_dropout(self.mlp(self.mlp_norm(x)), self.dropout, keys[2], self.mesh)
