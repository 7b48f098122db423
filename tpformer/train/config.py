"""Everything a pretraining run can be told, each field with its help; flags.py makes flags and TOML of it."""

from dataclasses import dataclass, field
from typing import Annotated, Generic, Literal, TypeVar

import tyro

from tpformer.models.gpt import GPTConfig
from tpformer.models.llama import LlamaConfig
from tpformer.parallel_config import ParallelConfig
from tpformer.train.schedule import OptimizerConfig

ModelT = TypeVar("ModelT", LlamaConfig, GPTConfig)


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    data: str = "python"
    """Text (a file, a directory or a quoted glob; .jsonl with a "text" field), Megatron's .bin/.idx pair, or
    nanoGPT's .bin; "python" is the library source of this Python installation."""
    tokenizer: str = "byte"
    """"byte", or the path of a Hugging Face tokenizer.json."""
    validation_part: float = 0.05
    """Part of the files (of the tokens, where there is one file or a .bin) that is held out for validation."""
    seq_len: int = 256
    """Tokens in a training sample."""


@dataclass(frozen=True)
class RunConfig:
    """How long, how large and where to."""

    steps: int = 200
    """Optimizer steps of the whole run."""
    batch_size: int = 8
    """Samples in a step, over all replicas."""
    micro_batch_size: int = 0
    """Samples in one forward and backward of a replica; 0 is all of its samples at once."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser in the training loss."""
    seed: int = 0
    """Of the initial weights, the order of the data and dropout."""
    eval_interval: int = 100
    """Steps between evaluations on the held-out data; 0 evaluates only at the end."""
    eval_samples: int = 64
    """Samples in an evaluation."""
    checkpoint_interval: int = 100
    """Steps between checkpoints; 0 saves only at the end."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints stay; 0 keeps all."""
    keep_every: int = 0
    """The checkpoints of every so many steps stay for good; 0: of none."""
    async_checkpoint: bool = True
    """Write checkpoints while training goes on, from a copy in host memory."""
    log_interval: int = 10
    """Steps between lines of metrics.jsonl."""
    sample_tokens: int = 200
    """Length of the sample that is generated at the end, in tokens; less where max_seq_len leaves less."""
    prompt: str = "def "
    """What the sample begins with."""
    runs_dir: str = "runs"
    """Where runs are kept."""
    name: str = ""
    """The run's directory below runs_dir; by default the date and time (with --resume, the latest run)."""
    init_from: str = ""
    """A Hugging Face directory, or a run's checkpoint, whose model, weights and tokenizer the run begins with."""
    resume: bool = False
    """Go on from the last checkpoint of a run, with its configuration and whatever flags are given."""
    timeline: bool = False
    """Record when each pipeline stage worked and idled in one step: a table, and timeline.png."""
    memory_snapshot: bool = False
    """Write torch's record of a step's allocations, on CUDA, for pytorch.org/memory_viz."""
    timeout_seconds: float = 600.0
    """One of several ranks for which no step (or evaluation batch, or checkpoint) ends in this time ends, and says for
    which collective it waited; to be longer than any step, and than a checkpoint, for whose end a run waits."""
    check_replicas: int = 0
    """Steps between comparisons of all copies of weights and moments, bit for bit, by checksums; 0 never compares."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: GPUs where there are any."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        counts = ("micro_batch_size", "seed", "eval_interval", "eval_samples", "checkpoint_interval", "check_replicas")
        for name in (*counts, "keep_checkpoints", "keep_every", "sample_tokens", "z_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0")
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds ({self.timeout_seconds}) must be above 0")
        for name, number, which in (("memory_snapshot", 2, "second"), ("timeline", 3, "third")):
            if getattr(self, name) and self.steps < number:
                raise ValueError(f"{name} is of a run's {which} step: steps ({self.steps}) must be at least {number}")


@dataclass(frozen=True)
class TrainConfig(Generic[ModelT]):
    """One pretraining run, in sections that each belong to the part that reads them."""

    model: Annotated[ModelT, tyro.conf.arg(name="")]
    family: Literal["llama", "gpt"] = "llama"
    """The model family; the model's flags below are of this one."""
    config: str = ""
    """A TOML file with any of these settings, in the sections of a run's config.toml; flags come on top."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()
    data: Annotated[DataConfig, tyro.conf.arg(name="")] = DataConfig()
    parallel: Annotated[ParallelConfig, tyro.conf.arg(name="")] = ParallelConfig()
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: OptimizerConfig(lr=4e-3, warmup_steps=20)
    )


# what `make pretrain` trains: vocab_size and max_seq_len 0 are filled in from the tokenizer and seq_len
SMALL_LLAMA = LlamaConfig(
    vocab_size=0, hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, ffn_hidden_size=688, max_seq_len=0
)
SMALL_GPT = GPTConfig(vocab_size=0, hidden_size=256, num_layers=4, num_heads=4, max_seq_len=0)
