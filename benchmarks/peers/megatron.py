"""Megatron-core's GPTModel as a Llama, from its local layer spec (its own layers, without Transformer Engine)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.plain import PlainLlamaConfig, from_tpformer
from benchmarks.peers.shards import Rename, load, renamed, whole_gradients
from benchmarks.peers.step import Step, check_world, dtype_of, gemm_backend, installed

__all__ = ["AXIS", "NAME", "build", "gemm_backend", "version"]

NAME = "megatron-core GPTModel"
AXIS: Literal["tp", "dp"] = "tp"
MODULES = {  # tpformer's names and theirs
    "attention_norm": "input_layernorm",
    "mlp_norm": "pre_mlp_layernorm",
    "attention.qkv": "self_attention.linear_qkv",
    "attention.out": "self_attention.linear_proj",
    "mlp.gate_up": "mlp.linear_fc1",
    "mlp.down": "mlp.linear_fc2",
    "embedding": "embedding.word_embeddings",
    "norm": "decoder.final_layernorm",
    "head": "output_layer",
}


def version() -> str:
    """megatron-core's."""
    return installed("megatron-core")


def stand_in_for_cuda() -> None:
    """Without CUDA megatron-core would ask for its device, and fork its generator at a dropout of zero.

    Both are answered for the whole process, which must run nothing else that needs the true answers.
    """
    from megatron.core import tensor_parallel

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    tensor_parallel.get_cuda_rng_tracker = lambda: SimpleNamespace(fork=nullcontext)


def transformer_config(shape: PlainLlamaConfig, degree: int, dtype: torch.dtype) -> Any:
    """Megatron's configuration of the plain model, without the fusions that need apex or a GPU."""
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=degree,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )


def initialize(degree: int, device: torch.device) -> None:
    """Megatron-core's process groups, once for the process, and its generators where there are any."""
    with warnings.catch_warnings(action="ignore"):  # of each optional package that is not there
        from megatron.core import parallel_state, tensor_parallel

    if device.type == "cpu":
        stand_in_for_cuda()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=degree)
    if device.type == "cuda":
        tensor_parallel.model_parallel_cuda_manual_seed(0)


def gpt_model(shape: PlainLlamaConfig, config: Any) -> nn.Module:
    """This rank's part of the model, not yet initialised."""
    with warnings.catch_warnings(action="ignore"):
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    model: nn.Module = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_seq_len,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
    )
    return model


def gates_above_ups(weight: Tensor, degree: int) -> Tensor:
    """tpformer's gate_up, whose rows alternate, in their order: each rank's gates above its ups."""
    return torch.cat([torch.cat((part[0::2], part[1::2])) for part in weight.chunk(degree)])


def alternating(weight: Tensor, degree: int) -> Tensor:
    """The inverse of `gates_above_ups`."""
    return torch.cat([torch.stack(part.chunk(2), dim=1).flatten(0, 1) for part in weight.chunk(degree)])


def step_of(
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    weights: dict[str, Tensor],
    shape: PlainLlamaConfig,
    rename: Rename,
) -> Step:
    """The step of a model with tpformer's weights, of which gate_up only is laid out otherwise."""
    degree, names = dist.get_world_size(), list(weights)
    fused = [name for name in names if name.endswith("mlp.gate_up.weight")]
    load(model, weights | {name: gates_above_ups(weights[name], degree) for name in fused}, rename)

    def forward_backward(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = loss_of(tokens, targets)
        loss.backward()
        return loss.detach()

    def gradients() -> dict[str, Tensor]:
        full = whole_gradients(model, names, rename)
        return from_tpformer(shape, full | {name: alternating(full[name], degree) for name in fused})

    return Step(model, forward_backward, gradients)


def build(shape: PlainLlamaConfig, degree: int, device: torch.device, weights: dict[str, Tensor]) -> Step:
    """The step of the whole GPTModel with its vocabulary-parallel loss, cut over `degree` ranks.

    On a GPU Megatron's users take Transformer Engine's layers: these are not its best there.
    """
    version()
    check_world(NAME, degree)
    initialize(degree, device)
    dtype = dtype_of(weights)
    model = gpt_model(shape, transformer_config(shape, degree, dtype)).to(device, dtype)  # the norms are made in fp32

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        length = tokens.shape[1]
        positions = torch.arange(length, device=tokens.device).expand_as(tokens)
        hidden = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).triu(1)
        losses: Tensor = model(tokens, positions, hidden, labels=targets)
        return losses.mean()

    return step_of(model, loss_of, weights, shape, partial(renamed, modules=MODULES, layers="decoder.layers"))
