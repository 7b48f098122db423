"""What one rank computes for one micro-batch: FLOPs of matmuls and attention, and bytes to and from memory."""

from dataclasses import dataclass
from functools import lru_cache

from tpformer.layers.embedding import padded_vocab
from tpformer.models.llama import LlamaConfig
from tpformer.planner.candidate import Candidate


@dataclass(frozen=True)
class Work:
    """Of one forward or one backward, on one rank."""

    matmul: float = 0.0
    """FLOPs of products with weights."""
    attention: float = 0.0
    """FLOPs of the products of queries, keys and values that are computed: half the square, for it is causal."""
    bytes: float = 0.0
    """Read and written by all operators, each operand once."""

    def __add__(self, other: "Work") -> "Work":
        return Work(self.matmul + other.matmul, self.attention + other.attention, self.bytes + other.bytes)

    def times(self, factor: float) -> "Work":
        """So many of it."""
        return Work(self.matmul * factor, self.attention * factor, self.bytes * factor)


@dataclass(frozen=True)
class Sizes:
    """A block's local sizes: what one rank of tp has of it."""

    tokens: int
    """Of a micro-batch, whole."""
    hidden: int
    heads: int
    q: int
    kv: int
    ffn: int
    gated: bool
    shared: int
    """By how many ranks tokens are shared out between the regions: tp under sequence parallelism, otherwise 1."""

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of the four products."""
        d, up = self.hidden, self.ffn * (2 if self.gated else 1)
        return (d, self.q + 2 * self.kv), (self.q, d), (d, up), (self.ffn, d)

    @property
    def weights(self) -> int:
        """Numbers in the four matrices."""
        return sum(a * b for a, b in self.matrices)


def sizes(candidate: Candidate) -> Sizes:
    """The local sizes of a candidate's blocks."""
    model, p = candidate.model, candidate.parallel
    a = model.attention
    return Sizes(
        tokens=candidate.micro_batch_size * candidate.seq_len,
        hidden=model.hidden_size,
        heads=a.num_heads // p.tp,
        q=a.num_heads * a.head_dim // p.tp,
        kv=max(a.num_kv_heads // p.tp, 1) * a.head_dim,
        ffn=candidate.ffn_size // p.tp,
        gated=isinstance(model, LlamaConfig),
        shared=p.tp if p.sequence_parallel else 1,
    )


@lru_cache(maxsize=4096)
def block_work(s: Sizes, seq_len: int, width: int, fused_attention: bool = True) -> tuple[Work, Work]:
    """Forward and backward of a block; width: bytes of a number.

    Backward multiplies twice, reads and writes twice as much and adds to the weights' gradients in fp32; fused
    attention computes its scores once more there. Not fused, the scores (heads, s, s) go to memory: they are written,
    scaled and masked, their softmax taken and dropped out, and read again (arXiv 2205.05198, figure 2).
    """
    n, d = s.tokens, s.hidden
    matmul = 2.0 * n * s.weights
    moved = width * sum(n * a + a * b + n * b for a, b in s.matrices)
    norms = 8.0 * n * d / s.shared  # two: the stream and the sum before it, read and written
    pointwise = norms + n * (2 * (s.q + s.kv) if s.gated else 0) + n * s.ffn * (3 if s.gated else 2)
    square = 4.0 * n * seq_len * s.q
    if fused_attention:
        attention, scores = square / 2, width * n * 2.0 * (s.q + s.kv)
        back = 2.5 * attention
    else:
        attention, back = square, 2 * square
        scores = width * 9.0 * n * seq_len * s.heads
    forward = Work(matmul, attention, moved + width * pointwise + scores)
    return forward, Work(2 * matmul, back, 2 * forward.bytes + 8.0 * s.weights)


def first_work(s: Sizes, width: int) -> tuple[Work, Work]:
    """Forward and backward of the embedding: rows read and written; their gradients added in fp32."""
    moved = 2.0 * width * s.tokens * s.hidden
    return Work(bytes=moved), Work(bytes=moved + 8.0 * s.tokens * s.hidden)


def last_work(s: Sizes, vocabulary: int, width: int) -> tuple[Work, Work]:
    """Forward and backward of the norm and the head with its loss, which multiplies all three times in forward."""
    logits = float(s.tokens * vocabulary)
    weight = float(s.hidden * vocabulary)
    # logits are written, read twice for their statistics and gradient, written as that and read by two products
    moved = width * (6 * logits + 3 * s.tokens * s.hidden + 2 * weight) + 8 * weight
    return Work(matmul=6 * logits * s.hidden, bytes=moved), Work(bytes=3.0 * width * s.tokens * s.hidden)


def vocabulary(candidate: Candidate) -> int:
    """Rows of the head that one rank of tp has, padding included."""
    tp = candidate.parallel.tp
    return padded_vocab(candidate.model.vocab_size, tp) // tp
