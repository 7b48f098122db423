"""What a run asks of its processes and their memory: plain numbers and names, no processes (the planner uses it)."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

Overlap = Literal["auto", "symm_mem", "chunked", "off"]
"""How the matmuls of sequence parallelism run beside their communication: `overlap.overlap_mode` says what each is."""
Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]
"""The order of a pipeline's forwards and backwards, `parallel/pipeline.py`."""
DataParallel = Literal["replicate", "zero2", "fsdp", "hsdp"]
"""What the replicas share out: nothing; gradients and optimizer state; parameters too; that inside a node only."""
Recompute = Literal["none", "full", "selective"]
Precision = Literal["fp32", "bf16", "fp16"]

ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv", "dualpipev")
"""Schedules that compute the gradients of weights apart from those of activations."""
V_SHAPED = ("zbv", "dualpipev")
"""Schedules in which a rank has one stage on the way down and one on the way up."""


@dataclass(frozen=True)
class ParallelConfig:
    """How a model is split, and what is kept, recomputed or moved to save memory.

    Raises ValueError for values out of range, and for options that exclude each other.
    """

    tp: int = 1
    """Tensor-parallel degree: how many processes share each layer."""
    pp: int = 1
    """Pipeline-parallel degree: how many processes share the stack of layers."""
    dp: int | None = None
    """Data-parallel degree: how many replicas; by default whatever number of processes tp and pp leave."""
    sequence_parallel: bool = False
    """Also split the activations between the parallel regions along the sequence (arXiv 2205.05198)."""
    _: KW_ONLY
    overlap: Overlap = "auto"
    """Under sequence parallelism, what runs matmuls beside their communication: torch's symmetric memory, or chunks."""
    pp_schedule: Schedule = "1f1b"
    """Order of a pipeline's micro-batches; gpipe with one micro-batch is plain layer-wise parallelism."""
    stages_per_rank: int = 0
    """Pipeline stages of a process; 0 is 1 for gpipe and 1f1b and 2 for the others."""
    layers_per_stage: tuple[int, ...] = ()
    """Blocks of each pipeline stage, first to last; by default stages are balanced by cost."""
    dp_mode: DataParallel = "replicate"
    """What replicas share out: replicate nothing; zero2 gradients and optimizer state; fsdp parameters too; hsdp
    parameters within groups of dp_shard replicas."""
    dp_shard: int = 0
    """Replicas of an hsdp group; 0 takes those of a node."""
    recompute: Recompute = "none"
    """Activations computed again in backward: of whole blocks (full) or of recompute_modules (selective)."""
    recompute_modules: tuple[str, ...] = ("attention.core",)
    """Modules of a block, by name, that selective recomputation runs again."""
    recompute_every: int = 1
    """Recompute in every k-th block only."""
    offload_activations: bool = False
    """Keep what backward needs in host memory."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory."""
    precision: Precision = "fp32"
    """What the model computes in; weights, gradients and optimizer state are fp32 in any case."""
    fp32_residual: bool = False
    """Keep the residual stream in fp32 where the model computes in bf16 or fp16."""
    compile: bool = False
    """Compile each block with torch.compile."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "recompute_every"):
            degree = getattr(self, name)
            if degree is not None and degree < 1:
                raise ValueError(f"{name} ({degree}) must be at least 1")
        for name in ("stages_per_rank", "dp_shard"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0")
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        if self.overlap in ("symm_mem", "chunked") and not self.sequence_parallel:
            raise ValueError(
                f"overlap ({self.overlap!r}) needs sequence_parallel: without it no matmul has a gather before it "
                "or a reduce-scatter after it"
            )
        if self.recompute == "selective" and not self.recompute_modules:
            raise ValueError("recompute selective needs recompute_modules: name modules of a block, as attention.core")
        self._check_pipeline()
        if self.dp_shard and self.dp_mode != "hsdp":
            raise ValueError(f"dp_shard ({self.dp_shard}) is for dp_mode hsdp, not {self.dp_mode}")

    def _check_pipeline(self) -> None:
        single = self.pp_schedule in ("gpipe", "1f1b")
        if single and self.stages_per_rank > 1:
            raise ValueError(f"pp_schedule ({self.pp_schedule}) has one stage a rank, not {self.stages_per_rank}")
        if self.pp_schedule in V_SHAPED and self.stages_per_rank not in (0, 2):
            raise ValueError(f"pp_schedule ({self.pp_schedule}) has two stages a rank, not {self.stages_per_rank}")
        if self.pp > 1 and self.compile and self.pp_schedule in ZERO_BUBBLE:
            raise ValueError(
                f"compile cannot be used with pp_schedule ({self.pp_schedule}): it computes weights' gradients apart, "
                "which a compiled block cannot"
            )
        if self.layers_per_stage and len(self.layers_per_stage) != self.num_stages:
            raise ValueError(
                f"layers_per_stage has {len(self.layers_per_stage)} entries, but pp ({self.pp}) x stages_per_rank "
                f"({self.num_stages // self.pp}) makes {self.num_stages} stages"
            )
        if any(layers < 1 for layers in self.layers_per_stage):
            raise ValueError(f"layers_per_stage {self.layers_per_stage} must all be at least 1")

    @property
    def num_stages(self) -> int:
        """Pipeline stages of the whole model."""
        if self.pp == 1:
            return 1
        return self.pp * (self.stages_per_rank or (1 if self.pp_schedule in ("gpipe", "1f1b") else 2))

    def sizes(self, world_size: int) -> tuple[int, int, int]:
        """The sizes of the axes (pp, dp, tp) on `world_size` processes.

        Raises ValueError if the degrees do not multiply to `world_size`.
        """
        dp = self.dp if self.dp is not None else max(1, world_size // (self.tp * self.pp))
        if self.pp * dp * self.tp != world_size:
            raise ValueError(
                f"tp ({self.tp}) x pp ({self.pp}) x dp ({dp}) needs {self.pp * dp * self.tp} processes, "
                f"but {world_size} {'is' if world_size == 1 else 'are'} running: start them with "
                f"torchrun --nproc-per-node {self.pp * dp * self.tp}, or change the degrees"
            )
        return self.pp, dp, self.tp


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} ({value!r}) must be one of {', '.join(map(repr, choices))}")


_CHOICES = {
    "overlap": get_args(Overlap),
    "pp_schedule": get_args(Schedule),
    "dp_mode": get_args(DataParallel),
    "recompute": get_args(Recompute),
    "precision": get_args(Precision),
}
