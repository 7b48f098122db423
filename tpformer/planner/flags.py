"""A plan as the command that runs it."""

import dataclasses
import shlex

from tpformer.models.gpt import GPTConfig
from tpformer.models.llama import LlamaConfig
from tpformer.parallel_config import ParallelConfig
from tpformer.planner.candidate import Candidate, ModelConfig


def torchrun_command(candidate: Candidate, per_node: int) -> str:
    """The torchrun line of examples/pretrain.py for a layout; per_node: processes of one machine."""
    processes = candidate.world_size
    most = processes if candidate.on_cpu else min(per_node, processes)
    here = next(n for n in range(most, 0, -1) if processes % n == 0)  # every node has as many
    nodes = processes // here
    launch = ["torchrun", "--nproc-per-node", str(here)]
    if nodes > 1:
        launch += ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29500"]
    return shlex.join([*launch, "examples/pretrain.py", *pretrain_flags(candidate)])


def pretrain_flags(candidate: Candidate) -> list[str]:
    """The flags of examples/pretrain.py: layout, step and model. The data and their tokenizer are the user's."""
    p = candidate.parallel
    flags = _changed(p, ParallelConfig())
    flags += ["--seq-len", str(candidate.seq_len), "--batch-size", str(candidate.batch_size)]
    flags += ["--micro-batch-size", str(candidate.micro_batch_size)]
    return flags + _model_flags(candidate.model)


def _model_flags(model: ModelConfig) -> list[str]:
    """Every field that is not the family's default, and all sizes: what is trained by default is a small model."""
    family = "gpt" if isinstance(model, GPTConfig) else "llama"
    sizes = ["hidden_size", "num_layers", "num_heads", "max_seq_len", "vocab_size"]
    sizes += ["ffn_hidden_size", "num_kv_heads"] if family == "llama" else []
    flags = ["--family", family]
    for name in sizes:
        value = model.attention.num_kv_heads if name == "num_kv_heads" else getattr(model, name)
        flags += [f"--{name.replace('_', '-')}", str(value)]
    default = GPTConfig() if family == "gpt" else LlamaConfig()
    return flags + _changed(model, default, leave=tuple(sizes))


def _changed(config: object, default: object, leave: tuple[str, ...] = (), prefix: str = "") -> list[str]:
    flags: list[str] = []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, flag = getattr(config, field.name), f"--{prefix}{field.name.replace('_', '-')}"
        if field.name in leave or value == getattr(default, field.name):
            continue
        if dataclasses.is_dataclass(value):
            flags += _changed(value, getattr(default, field.name), prefix=f"{field.name.replace('_', '-')}.")
        elif isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return flags
