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
    nodes = -(-processes // per_node)
    launch = ["torchrun", "--nproc-per-node", str(min(per_node, processes))]
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
    """Every field that is not the family's default; those of the small model that is trained by default are said."""
    family = "gpt" if isinstance(model, GPTConfig) else "llama"
    sizes = ["hidden_size", "num_layers", "num_heads", "max_seq_len"]
    sizes += ["ffn_hidden_size", "num_kv_heads"] if family == "llama" else []
    flags = ["--family", family]
    for name in sizes:
        value = model.attention.num_kv_heads if name == "num_kv_heads" else getattr(model, name)
        flags += [f"--{name.replace('_', '-')}", str(value)]
    default = GPTConfig() if family == "gpt" else LlamaConfig()
    return flags + _changed(model, default, leave=(*sizes, "vocab_size", "rope_scaling"))


def _changed(config: object, default: object, leave: tuple[str, ...] = ()) -> list[str]:
    flags: list[str] = []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if field.name in leave or value == getattr(default, field.name):
            continue
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return flags
