"""torchtitan's Llama 3, cut by its own sharding configuration, with its vocabulary-parallel loss; not its trainer.

Three of its modules are others than in its own presets: its scaled_dot_product_attention in place of FlexAttention,
which has no backward on a CPU; its rotate-half positions, so that weights are the plain model's; and its separate
q, k and v.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.peers.plain import PlainLlamaConfig, from_tpformer
from benchmarks.peers.shards import load, renamed, whole_gradients
from benchmarks.peers.step import Step, check_world, dtype_of, gemm_backend, installed

__all__ = ["AXIS", "NAME", "build", "gemm_backend", "version"]

NAME = "torchtitan Llama"
AXIS: Literal["tp", "dp"] = "tp"
MODULES = {  # the plain model's names and theirs
    "attention_norm": "attention_norm",
    "mlp_norm": "ffn_norm",
    "attention.q": "attention.qkv_linear.wq",
    "attention.k": "attention.qkv_linear.wk",
    "attention.v": "attention.qkv_linear.wv",
    "attention.out": "attention.wo",
    "mlp.gate": "feed_forward.w1",
    "mlp.up": "feed_forward.w3",
    "mlp.down": "feed_forward.w2",
    "embedding": "tok_embeddings",
    "norm": "norm",
    "head": "lm_head",
}


def version() -> str:
    """torchtitan's."""
    return installed("torchtitan")


def layer_config(shape: PlainLlamaConfig) -> Any:
    """torchtitan's configuration of one block of the plain model."""
    from torchtitan.models.common import CosSinRoPE, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
    from torchtitan.models.llama3.model import Llama3TransformerBlock

    zeros = {"weight": nn.init.zeros_}
    norm = partial(RMSNorm.Config, normalized_shape=shape.hidden_size, eps=shape.norm_eps, param_init=zeros)
    attention = make_gqa_config(
        dim=shape.hidden_size,
        n_heads=shape.num_heads,
        n_kv_heads=shape.num_kv_heads,
        wqkv_param_init=zeros,
        wo_param_init=zeros,
        inner_attention=ScaledDotProductAttention.Config(),
        rope=CosSinRoPE.Config(dim=shape.head_dim, max_seq_len=shape.max_seq_len, theta=shape.rope_theta),
    )
    mlp = make_ffn_config(
        dim=shape.hidden_size, hidden_dim=shape.ffn_hidden_size, w1_param_init=zeros, w2w3_param_init=zeros
    )
    return Llama3TransformerBlock.Config(attention_norm=norm(), ffn_norm=norm(), attention=attention, feed_forward=mlp)


def model_config(shape: PlainLlamaConfig) -> Any:
    """torchtitan's configuration of the plain model, its sharding included."""
    from torchtitan.models.common import Embedding, Linear, RMSNorm
    from torchtitan.models.llama3.model import Llama3Model
    from torchtitan.models.llama3.sharding import set_llama3_sharding_config

    vocabulary, width = shape.vocab_size, shape.hidden_size
    zeros = {"weight": nn.init.zeros_}
    config = Llama3Model.Config(
        dim=width,
        vocab_size=vocabulary,
        tok_embeddings=Embedding.Config(num_embeddings=vocabulary, embedding_dim=width, param_init=zeros),
        norm=RMSNorm.Config(normalized_shape=width, eps=shape.norm_eps, param_init=zeros),
        lm_head=Linear.Config(in_features=width, out_features=vocabulary, param_init=zeros),
        layers=[layer_config(shape) for _ in range(shape.num_layers)],
    )
    set_llama3_sharding_config(config, enable_sp=False)
    return config


def parallel_model(shape: PlainLlamaConfig, dims: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """This rank's part of the model, all zeros; whole parameters never lie in memory."""
    with torch.device("meta"):
        model: Any = model_config(shape).build()
    model.to(dtype).parallelize(dims)
    model.to_empty(device=device)
    model.init_states(buffer_device=device)
    return model


def stand_in_for_an_accelerator(device: torch.device) -> None:
    """For the whole process: its meshes are of this device, and torch's process group that does nothing is known.

    torchtitan takes a machine without an accelerator for one with CUDA, and gives axes of one rank that group.
    """
    from torch.testing._internal.distributed import fake_pg  # noqa: F401
    from torchtitan.distributed import parallel_dims

    parallel_dims.device_type = device.type


def build(shape: PlainLlamaConfig, degree: int, device: torch.device, weights: dict[str, Tensor]) -> Step:
    """The step of Llama3Model in its spmd_types backend without sequence parallelism, cut over `degree` ranks."""
    version()
    check_world(NAME, degree)
    stand_in_for_an_accelerator(device)
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed.utils import get_spmd_context

    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=degree, pp=1, ep=1, world_size=degree)
    context = get_spmd_context(parallel_dims=dims)
    rename = partial(renamed, modules=MODULES, layers="layers")
    state = from_tpformer(shape, weights)
    with context():
        model = parallel_model(shape, dims, device, dtype_of(weights))
    load(model, state, rename)
    names = list(state)

    def forward_backward(tokens: Tensor, targets: Tensor) -> Tensor:
        with context():
            total = cross_entropy_loss(model(tokens), targets, global_vocab_size=shape.vocab_size)
            loss: Tensor = total / targets.numel()
            loss.backward()
        return loss.detach()

    return Step(model, forward_backward, lambda: whole_gradients(model, names, rename))
