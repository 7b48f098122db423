"""The shapes of one micro-batch on one rank."""

from dataclasses import dataclass

from tpformer.models.gpt import GPTConfig
from tpformer.planner.candidate import Candidate, ModelConfig
from tpformer.planner.terms import Term, term


@dataclass(frozen=True)
class Sizes:
    """The shapes of one micro-batch on one rank."""

    model: ModelConfig
    b: int
    s: int
    tp: int
    gathers: bool
    """Sequence parallelism over more than one rank."""
    width: int
    """Bytes of a number that the model computes in."""
    stream: int
    """Bytes of a number of the residual stream."""
    scaled: bool
    """fp16."""
    on_cpu: bool

    @staticmethod
    def of(candidate: Candidate) -> "Sizes":
        """A candidate's."""
        p, width = candidate.parallel, candidate.width
        return Sizes(
            candidate.model,
            candidate.micro_batch_size,
            candidate.seq_len,
            p.tp,
            p.sequence_parallel and p.tp > 1,
            width,
            4 if p.fp32_residual else width,
            p.precision == "fp16",
            candidate.on_cpu,
        )

    @property
    def gpt(self) -> bool:
        """LayerNorm, biases and learned positions."""
        return isinstance(self.model, GPTConfig)

    @property
    def heads(self) -> int:
        """Query heads of the rank."""
        return self.model.attention.num_heads // self.tp

    @property
    def kv_heads(self) -> int:
        """Key heads of the rank; a copy of one where there are more ranks."""
        return max(1, self.model.attention.num_kv_heads // self.tp)

    @property
    def ffn(self) -> int:
        """Inner features of the rank's MLP."""
        model = self.model
        return (model.ffn_size if isinstance(model, GPTConfig) else model.ffn_hidden_size) // self.tp

    @property
    def expands(self) -> bool:
        """Keys and values are repeated for each query head: on a CPU, where torch's kernel is the faster for it."""
        return self.on_cpu and self.heads != self.kv_heads

    def whole(self, name: str, label: str, features: int, count: int = 1, width: int = 0) -> Term:
        """(b, s, features), `count` times."""
        several = (("tensors", count),) if count > 1 else ()
        return term(name, *several, ("b", self.b), ("s", self.s), (label, features), ("bytes", width or self.width))

    def local(self, name: str, count: int = 1, width: int = 0) -> Term:
        """(b, s, d) or, under sequence parallelism, (b, s/tp, d), `count` times."""
        length = ("s/tp", self.s // self.tp) if self.gathers else ("s", self.s)
        several = (("tensors", count),) if count > 1 else ()
        d = ("d", self.model.hidden_size)
        return term(name, *several, ("b", self.b), length, d, ("bytes", width or self.width))
