"""A row of a published table of training runs, and the FLOPs that such rates are counted with."""

from dataclasses import dataclass
from typing import Literal

from tpformer.models.gpt import GPTConfig
from tpformer.models.llama import LlamaConfig
from tpformer.parallel_config import ParallelConfig

Counted = Literal["model", "hardware"]


@dataclass(frozen=True)
class Published:
    """One row of a published table. None is what was not published."""

    table: str
    name: str
    model: GPTConfig | LlamaConfig
    parameters: float
    """As published, with its few digits."""
    parallel: ParallelConfig
    """The layout, as this project's flags would ask for it."""
    seq_len: int
    batch_size: int
    """Samples of a step, over all replicas."""
    micro_batch_size: int | None
    device: str
    network: str
    """Between nodes."""
    tflops: float | None = None
    """10^12 FLOP/s of one GPU, by the FLOPs that `counted` says."""
    seconds: float | None = None
    """Of a step."""
    counted: Counted = "model"
    """model: forward and backward; hardware: also the whole forward that full recomputation adds."""
    mfu: float | None = None
    """Share of the device's peak, by the model's FLOPs."""
    petaflops: float | None = None
    """10^15 FLOP/s of all GPUs."""
    tokens: float | None = None
    """Tokens a second of one GPU."""
    fused_attention: bool = False
    """Whether scores stayed out of memory (FlashAttention)."""
    note: str = ""

    @property
    def gpus(self) -> int:
        """GPUs of the run."""
        return self.parallel.tp * self.parallel.pp * (self.parallel.dp or 1)

    @property
    def flops(self) -> float:
        """FLOPs of a step by the formula that the row's publishers count with."""
        if isinstance(self.model, LlamaConfig):
            return float(self.model.flops_per_token(self.seq_len)) * self.batch_size * self.seq_len
        return megatron_flops(self.model, self.batch_size, self.seq_len, self.counted)

    @property
    def step_seconds(self) -> float:
        """Of a step: published, or from the published rate and its formula."""
        if self.seconds is not None:
            return self.seconds
        if self.tokens is not None:
            return self.batch_size * self.seq_len / (self.tokens * self.gpus)
        if self.tflops is None:
            raise ValueError(f"{self.table} {self.name} was published with neither seconds nor a rate")
        return self.flops / (self.tflops * 1e12 * self.gpus)


def megatron_flops(model: GPTConfig, batch_size: int, seq_len: int, counted: Counted) -> float:
    """FLOPs of a step: 96 B s l h² (1 + s/6h + V/16lh) with full recomputation (arXiv 2104.04473, equation 3), else
    72 B s l h² (1 + s/6h + V/12lh) (arXiv 2205.05198, equation 7). Attention's whole square counts."""
    h, layers, vocabulary = model.hidden_size, model.num_layers, model.vocab_size
    passes = 4 if counted == "hardware" else 3  # the head is not recomputed
    blocks = 24 * passes * batch_size * seq_len * layers * h * h * (1 + seq_len / (6 * h))
    return blocks + 6.0 * batch_size * seq_len * h * vocabulary
