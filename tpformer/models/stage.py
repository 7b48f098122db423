"""A stretch of a decoder as a module of its own: what a pipeline runs, and what FSDP takes as its root."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from tpformer.collectives import gather_features
from tpformer.layers.cache import KVCache
from tpformer.mesh import Mesh
from tpformer.models.decoder import Part
from tpformer.random import Key


class DecoderStage(nn.Module):
    """The blocks and ends of one Part of a model, which it shares with it, under the same names.

    First: tokens (b, s) -> x; then x -> x, (b, s, d) or (b, s/tp, d) under sequence parallelism; last: x -> the mean
    loss in nats per token or, without targets, the whole logits (b, s, vocab_size) on every tp rank; with a cache
    those after the last position only, (b, vocab_size).
    around: entered around every forward (an ActivationOffload).
    """

    def __init__(self, model: Any, part: Part, around: AbstractContextManager[Any] | None = None):
        super().__init__()
        self._around = around or nullcontext()
        self.part, self.config = part, model.config
        self.mesh: Mesh = model.mesh
        self._model = (model,)  # a tuple, so that its other stages are no children of this one
        self.blocks = nn.ModuleDict({str(layer): model.blocks[str(layer)] for layer in part.layers})
        tied = ("embedding",) if model.head is None else ()
        ends = ("embedding", "position") * part.first + ("norm", "head", *tied) * part.last
        for name, child in model.named_children():
            if name in ends:
                self.add_module(name, child)

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        *,
        key: Key | None = None,
        z_loss: float = 0.0,
        cache: KVCache | None = None,
    ) -> Tensor:
        """What this stage makes of x or of tokens; a key switches dropout on."""
        with self._around:
            (model,) = self._model
            if self.part.first:
                x = model.embed(x, key, cache)
            x = model.run_blocks(x, self.part.layers, key=key, cache=cache)
            if not self.part.last:
                return x
            if cache is not None:
                return model.last_logits(x)
            x = model.norm(x)
            return model.head_loss(x, targets, z_loss) if targets is not None else self._full(model.to_logits(x))

    def loss(self, tokens: Tensor, targets: Tensor, *, key: Key | None = None, z_loss: float = 0.0) -> Tensor:
        """Of a stage that is a whole model: mean cross entropy in nats per token."""
        return self(tokens, targets, key=key, z_loss=z_loss)

    def full_logits(self, tokens: Tensor) -> Tensor:
        """Of a stage that is a whole model: int64 (b, s) -> (b, s, vocab_size) on every rank; collective."""
        return self(tokens)

    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Of a stage that is a whole model: as the model's own."""
        return self(tokens, cache=cache)

    def _full(self, logits: Tensor) -> Tensor:
        return gather_features(logits, self.mesh.tp)[..., : self.config.vocab_size]
