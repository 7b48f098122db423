"""What generation keeps of the tokens it has seen: each block's keys and values, and where every token stands."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of a process's blocks, for batches of at most `length` columns.

    attention_mask: bool (b, s), False for padding, which stands to the left of each prompt; None: there is none.
    Before a model is given the next s columns, `advance(s)` says so: the prompts' first, then one at a time.
    """

    def __init__(self, length: int, attention_mask: Tensor | None = None):
        self.length = length
        self.start = self.stop = 0
        self.positions: slice | Tensor = slice(0, 0)
        """Of the columns now computed, each row's counted from its own first token: an index, (s) or int64 (b, s)."""
        self.rope: tuple[Tensor, Tensor] | None = None
        """Rotations of every position, made once."""
        self._blocks: dict[str, BlockCache] = {}
        self._padding: Tensor | None = None  # (b, 1)
        self._seen: Tensor | None = None  # (b, length)
        if attention_mask is not None and not attention_mask.all():
            self._padding = (~attention_mask).sum(1, keepdim=True)
            self._seen = torch.arange(length, device=attention_mask.device) >= self._padding

    def advance(self, columns: int) -> None:
        """The model is about to be given this many columns more.

        Raises ValueError beyond `length`, and for several columns after the first ones.
        """
        if self.stop + columns > self.length or (self.stop and columns != 1):
            raise ValueError(
                f"after {self.stop} columns, {columns} more must be one at a time and within length ({self.length})"
            )
        self.start, self.stop = self.stop, self.stop + columns
        self.positions = slice(self.start, self.stop)
        if self._padding is not None:
            columns_now = torch.arange(self.start, self.stop, device=self._padding.device)
            self.positions = (columns_now - self._padding).clamp(min=0)

    def block(self, name: str) -> "BlockCache":
        """That of the block of this name."""
        if name not in self._blocks:
            self._blocks[name] = BlockCache(self)
        return self._blocks[name]

    def seen(self, first: int) -> Tensor | None:
        """Which of the columns from `first` to the last are tokens, bool (b, columns); None: all."""
        return None if self._seen is None else self._seen[:, first : self.stop]


class BlockCache:
    """Keys and values of one attention block, each (b, kv_heads/tp, length, head_dim), allocated once."""

    def __init__(self, shared: KVCache):
        self._shared = shared
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep k and v of the columns now computed, (b, kv_heads/tp, s, head_dim).

        Returns the keys and values that their queries may see, and which of those are no padding: of the prompts all;
        of one column after them, those that the window leaves.
        """
        start, stop = self._shared.start, self._shared.stop
        if self.keys is None or self.values is None:
            shape = (*k.shape[:2], self._shared.length, k.shape[3])
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        self.keys[:, :, start:stop], self.values[:, :, start:stop] = k, v
        if start == 0:
            return k, v, self._shared.seen(0)
        first = 0 if window is None else max(0, stop - window)
        return self.keys[:, :, first:stop], self.values[:, :, first:stop], self._shared.seen(first)
