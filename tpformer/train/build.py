"""From a configuration to what trains: this process's part of the model, its stages, its gradients, its optimizer."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from tpformer.mesh import Mesh, divide
from tpformer.models.gpt import GPT, GPTConfig
from tpformer.models.init import init_weights
from tpformer.models.llama import Llama
from tpformer.models.stage import DecoderStage
from tpformer.parallel.compile import compile_blocks
from tpformer.parallel.data import GradientBuckets
from tpformer.parallel.fsdp import ShardedGradients, is_sharded, shard
from tpformer.parallel.offload import ActivationOffload
from tpformer.parallel.pipeline import MicroBatches, Pipeline
from tpformer.parallel.recompute import apply_recompute
from tpformer.parallel.split import part_of, stage_parts, stages_of
from tpformer.train.config import TrainConfig
from tpformer.train.optimizer import Optimizer

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Training:
    """A model laid out for training; `runner` has its loss, logits and, in a pipeline, backward."""

    model: Any
    runner: Any
    gradients: GradientBuckets | ShardedGradients
    optimizer: Optimizer
    offload: ActivationOffload | None = None


def build(config: TrainConfig[Any], mesh: Mesh, vocab_size: int) -> Training:
    """Lay the configured model out on the mesh; vocab_size and max_seq_len of 0 become the data's.

    Raises ValueError for a config that does not fit the mesh.
    """
    layout, seq_len = config.parallel, config.data.seq_len
    sizes = model_config(config, mesh, vocab_size)
    parts = stage_parts(sizes, layout, seq_len)
    kind: Any = GPT if isinstance(sizes, GPTConfig) else Llama
    part = part_of(mesh.pp.rank, parts, layout)
    model = kind(sizes, mesh, seed=None, part=part, fp32_residual=layout.fp32_residual)  # on the meta device
    if layout.compile:
        compile_blocks(model)
    apply_recompute(model, layout)
    offload = ActivationOffload(mesh.device) if layout.offload_activations else None
    stages = {number: DecoderStage(model, parts[number], offload) for number in stages_of(mesh.pp.rank, layout)}
    dtype, sharded = DTYPES[layout.precision], is_sharded(mesh, layout)
    if sharded:
        shard(stages, mesh, layout, dtype)
    else:
        model.to_empty(device=mesh.device)
    init_weights(model, mesh, seed=config.run.seed, std=sizes.init_std, num_layers=sizes.num_layers)
    compute = dtype or next(model.parameters()).dtype
    optimizer = Optimizer(model, mesh, config.optimizer, dtype, offload=layout.offload_optimizer)
    gradients = ShardedGradients(model, stages, mesh, layout) if sharded else GradientBuckets(model, mesh)
    if mesh.pp.size == 1:
        return Training(model, stages[0], gradients, optimizer, offload)
    stream = torch.promote_types(compute, torch.float32) if layout.fp32_residual else compute
    batches = micro_batches(config, mesh, stream)
    return Training(model, Pipeline(stages, mesh, layout, gradients, batches), gradients, optimizer, offload)


def model_config(config: TrainConfig[Any], mesh: Mesh, vocab_size: int) -> Any:
    """The model's sizes, completed by the data's; raises ValueError if the two do not fit."""
    seq_len = config.data.seq_len
    model = replace(config.model, vocab_size=vocab_size, max_seq_len=config.model.max_seq_len or seq_len)
    if seq_len > model.max_seq_len:
        raise ValueError(f"seq_len ({seq_len}) must be at most max_seq_len ({model.max_seq_len})")
    if mesh.sequence_parallel:
        divide(seq_len, mesh.tp.size, "seq_len")
    return model


def micro_batches(config: TrainConfig[Any], mesh: Mesh, dtype: torch.dtype) -> MicroBatches:
    """How a replica's batch is cut for a pipeline; raises ValueError if it cannot be cut into equal parts."""
    mine = divide(config.run.batch_size, mesh.dp.size, "batch_size", "dp")
    size = config.run.micro_batch_size or mine
    return MicroBatches(divide(mine, size, "batch_size / dp", "micro_batch_size"), size, config.data.seq_len, dtype)
