"""Windows of a token array, in an order that any restart and any parallel layout agree on."""

import numpy as np
import numpy.typing as npt
import torch

from tpformer.data.indexed import Tokens


class TokenSampler:
    """Numbers every training sample from the beginning of training and returns any of them.

    A sample is a window of seq_len + 1 tokens: inputs, and the same shifted by one. Windows begin every
    `seq_len` tokens; `num_samples = (len(tokens) - 1) // seq_len` of them make an epoch, and up to seq_len - 1
    tokens at the end are not used. Each epoch visits each window once, in an order that depends only on
    (seed, epoch), or from first to last with shuffle=False (validation).

    Raises ValueError for tokens that are not a 1-D array of integers or fewer than seq_len + 1.
    """

    def __init__(
        self,
        tokens: Tokens,
        seq_len: int,
        seed: int,
        vocab_size: int,
        shuffle: bool = True,
    ) -> None:
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens have shape {tokens.shape} and type {tokens.dtype}, expected 1-D integers")
        if seq_len < 1 or seed < 0:
            raise ValueError(f"seq_len = {seq_len} and seed = {seed}: expected seq_len >= 1 and seed >= 0")
        if len(tokens) < seq_len + 1:
            raise ValueError(
                f"{len(tokens)} tokens are fewer than seq_len + 1 = {seq_len + 1}: give more text or a smaller seq_len"
            )
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.vocab_size, self.shuffle = vocab_size, shuffle
        self.num_samples = (len(tokens) - 1) // seq_len
        self._orders: dict[int, torch.Tensor] = {}  # a cache: the current and the next epoch's

    def samples(self, start: int, count: int) -> torch.Tensor:
        """The samples numbered start..start + count - 1 since the beginning of training: int64 (count, seq_len + 1).

        A pure function of its arguments: resume by asking for the next number; a data-parallel rank asks for
        its share of the numbers, the ranks of one tensor-parallel group for the same ones. Raises ValueError
        for start < 0 or count < 1, and when an id is outside the vocabulary.
        """
        if start < 0 or count < 1:
            raise ValueError(f"samples({start}, {count}): expected start >= 0 and count >= 1")
        batch = np.empty((count, self.seq_len + 1), dtype=np.int64)
        for row in range(count):
            first = self._window(start + row) * self.seq_len
            batch[row] = self.tokens[first : first + self.seq_len + 1]
        if batch.min() < 0 or batch.max() >= self.vocab_size:
            self._refuse(batch, start)
        return torch.from_numpy(batch)

    def _window(self, number: int) -> int:
        epoch, position = divmod(number, self.num_samples)
        return int(self._order(epoch)[position]) if self.shuffle else position

    def _order(self, epoch: int) -> torch.Tensor:
        """The order of the windows in one epoch, shape (num_samples,)."""
        if epoch not in self._orders:
            if len(self._orders) == 2:
                self._orders.pop(next(iter(self._orders)))
            # Torch's CPU generator uses the low 32 bits of a seed only, and seed + epoch would repeat one
            # seed's epochs in the next seed's: numpy mixes the pair into 32 bits, the same on every machine.
            mixed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
            generator = torch.Generator(device="cpu").manual_seed(mixed)
            self._orders[epoch] = torch.randperm(self.num_samples, generator=generator, device="cpu")
        return self._orders[epoch]

    def _refuse(self, batch: npt.NDArray[np.int64], start: int) -> None:
        row, column = np.argwhere((batch < 0) | (batch >= self.vocab_size))[0]
        position = self._window(start + int(row)) * self.seq_len + int(column)
        raise ValueError(
            f"sample {start + int(row)} holds id {batch[row, column]} at token {position}, but the vocabulary has "
            f"{self.vocab_size} ids (0..{self.vocab_size - 1}): use the tokenizer the tokens were made with"
        )
