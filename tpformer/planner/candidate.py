"""One layout of one training step: what memory, traffic and time are counted for."""

from dataclasses import dataclass
from functools import lru_cache

from tpformer.mesh import divide
from tpformer.models.decoder import Part
from tpformer.models.gpt import GPTConfig
from tpformer.models.llama import LlamaConfig
from tpformer.parallel.split import check_micro_batches, part_of, stage_parts
from tpformer.parallel_config import V_SHAPED, ParallelConfig, Schedule

ModelConfig = LlamaConfig | GPTConfig


def ffn_size(model: ModelConfig) -> int:
    """Inner width of a model's MLP."""
    return model.ffn_size if isinstance(model, GPTConfig) else model.ffn_hidden_size


def check_tp(model: ModelConfig, tp: int) -> None:
    """Raises ValueError if tp cannot split the model."""
    divide(model.num_heads, tp, "num_heads")
    kv_heads = model.attention.num_kv_heads
    if kv_heads % tp and tp % kv_heads:
        raise ValueError(f"num_kv_heads ({kv_heads}) must divide tp ({tp}) or be divisible by it")
    divide(ffn_size(model), tp, "ffn_hidden_size")


@dataclass(frozen=True)
class Candidate:
    """A model, how it is split, and the step's tokens. Raises ValueError where a run of it would."""

    model: ModelConfig
    parallel: ParallelConfig
    """dp is given, and dp_shard where dp_mode is hsdp."""
    seq_len: int
    """Tokens of a sample."""
    batch_size: int
    """Samples of a step, over all replicas."""
    micro_batch_size: int
    """Samples of one forward of a replica."""
    on_cpu: bool = False
    """Whether processes without GPUs run it."""

    def __post_init__(self) -> None:
        p, model = self.parallel, self.model
        if p.dp is None:
            raise ValueError("a candidate needs dp: how many replicas there are")
        if p.dp_mode == "hsdp":
            divide(p.dp, self.shards, "dp", "dp_shard")
        if self.seq_len > model.max_seq_len:
            raise ValueError(f"seq_len ({self.seq_len}) must be at most max_seq_len ({model.max_seq_len})")
        check_tp(model, p.tp)
        if p.sequence_parallel:
            divide(self.seq_len, p.tp, "seq_len")
        samples = divide(self.batch_size, p.dp, "batch_size", "dp")
        count = divide(samples, self.micro_batch_size, "batch_size / dp", "micro_batch_size")
        if p.pp > 1:
            check_micro_batches(p, count)
            if p.pp_schedule in V_SHAPED and model.tie_embeddings and self.shards > 1:
                raise ValueError(f"pp_schedule ({p.pp_schedule}) and dp_mode ({p.dp_mode}) cannot with tie_embeddings")

    @property
    def dp(self) -> int:
        """How many replicas, as a plain int."""
        return self.parallel.dp or 1

    @property
    def world_size(self) -> int:
        """Processes of the whole run."""
        return self.parallel.pp * self.dp * self.parallel.tp

    @property
    def shards(self) -> int:
        """How many replicas share out what dp_mode says; 1 if they share nothing."""
        p = self.parallel
        return {"replicate": 1, "hsdp": p.dp_shard or self.dp}.get(p.dp_mode, self.dp)

    @property
    def micro_batches(self) -> int:
        """Forwards of a replica in a step."""
        return self.batch_size // self.dp // self.micro_batch_size

    @property
    def width(self) -> int:
        """Bytes of a number in what the model computes in."""
        return 4 if self.parallel.precision == "fp32" else 2

    @property
    def ffn_size(self) -> int:
        """Inner width of the MLP."""
        return ffn_size(self.model)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The part of each pipeline stage, first to last."""
        return _parts(self.model, self.seq_len, *self._pipeline)

    @property
    def rank_kinds(self) -> tuple[tuple[int, Part], ...]:
        """Of the ranks on the pp axis with as many blocks and the same ends, the first one, and what it has."""
        return _rank_kinds(self.model, self.seq_len, *self._pipeline)

    def part(self, pp_rank: int) -> Part:
        """All that one rank of the pp axis has."""
        return part_of(pp_rank, list(self.parts), self.parallel)

    @property
    def _pipeline(self) -> tuple[int, Schedule, int, tuple[int, ...]]:
        p = self.parallel
        return p.pp, p.pp_schedule, p.stages_per_rank, p.layers_per_stage


@lru_cache(maxsize=4096)
def _parts(
    model: ModelConfig, seq_len: int, pp: int, schedule: Schedule, per_rank: int, layers: tuple[int, ...]
) -> tuple[Part, ...]:
    """Cached by what they depend on: a search asks for the same ones again and again."""
    config = ParallelConfig(pp=pp, pp_schedule=schedule, stages_per_rank=per_rank, layers_per_stage=layers)
    return tuple(stage_parts(model, config, seq_len))


@lru_cache(maxsize=4096)
def _rank_kinds(
    model: ModelConfig, seq_len: int, pp: int, schedule: Schedule, per_rank: int, layers: tuple[int, ...]
) -> tuple[tuple[int, Part], ...]:
    config = ParallelConfig(pp=pp, pp_schedule=schedule, stages_per_rank=per_rank, layers_per_stage=layers)
    parts = list(_parts(model, seq_len, pp, schedule, per_rank, layers))
    found: dict[tuple[int, bool, bool], tuple[int, Part]] = {}
    for rank in range(pp):
        part = part_of(rank, parts, config)
        found.setdefault((len(part.layers), part.first, part.last), (rank, part))
    return tuple(found.values())
