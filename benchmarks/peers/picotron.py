"""picotron's Llama with its tensor-parallel layers; not its trainer."""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.plain import PlainLlamaConfig, from_tpformer
from benchmarks.peers.shards import load, renamed, whole_gradients
from benchmarks.peers.step import Step, check_world, dtype_of, gemm_backend, installed

__all__ = ["AXIS", "NAME", "build", "gemm_backend", "version"]

NAME = "picotron"
AXIS: Literal["tp", "dp"] = "tp"
MODULES = {  # the plain model's names and theirs
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.q": "attention.q_proj",
    "attention.k": "attention.k_proj",
    "attention.v": "attention.v_proj",
    "attention.out": "attention.out_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "embedding": "embedding",
    "norm": "final_norm",
    "head": "final_proj",
}


def version() -> str:
    """picotron's."""
    return installed("picotron")


def stand_in_for_flash_attention() -> None:
    """picotron imports flash_attn, also where it calls none of it: without that package, empty names of it."""
    if "flash_attn" in sys.modules or find_spec("flash_attn") is not None:
        return
    functions = {
        "flash_attn.flash_attn_interface": "flash_attn_func",
        "flash_attn.layers.rotary": "apply_rotary_emb",
        "flash_attn.ops.triton.layer_norm": "layer_norm_fn",
    }
    for path, function in functions.items():
        steps = path.split(".")
        for name in (".".join(steps[:length]) for length in range(1, len(steps) + 1)):
            sys.modules.setdefault(name, ModuleType(name))
        setattr(sys.modules[path], function, None)


def set_environment(device: torch.device, dtype: torch.dtype) -> None:
    """picotron is told by the environment, which it reads at every forward: no flash_attn but torch's attention."""
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    os.environ["FLASH_ATTEN"] = "0"
    os.environ["DEVICE"] = device.type
    os.environ["DTYPE"] = "bfloat16" if dtype == torch.bfloat16 else "float32"


def llama(shape: PlainLlamaConfig, degree: int) -> nn.Module:
    """This rank's part of the model, with picotron's own initialisation."""
    from picotron import process_group_manager
    from picotron.model import Llama
    from picotron.tensor_parallel.tensor_parallel import ColumnParallelLinear, apply_tensor_parallel

    process_group_manager.setup_process_group_manager(tp_size=degree, cp_size=1, pp_size=1, dp_size=1)
    config = SimpleNamespace(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.ffn_hidden_size,
        max_position_embeddings=shape.max_seq_len,
        rms_norm_eps=shape.norm_eps,
        rope_theta=shape.rope_theta,
    )
    model: nn.Module = Llama(config)
    if degree > 1:
        apply_tensor_parallel(model)
        for module in model.modules():
            if isinstance(module, ColumnParallelLinear):  # the faster of its two ways, which it has no flag for
                module.async_all_reduce = True
    return model


def build(shape: PlainLlamaConfig, degree: int, device: torch.device, weights: dict[str, Tensor]) -> Step:
    """The step of picotron's Llama, cut over `degree` ranks; raises ValueError for sequences of another length."""
    version()
    check_world(NAME, degree)
    dtype = dtype_of(weights)
    stand_in_for_flash_attention()
    set_environment(device, dtype)
    model = llama(shape, degree).to(device, dtype)
    rename = partial(renamed, modules=MODULES, layers="decoder_layers")
    state = from_tpformer(shape, weights)
    load(model, state, rename)
    names = list(state)

    def forward_backward(tokens: Tensor, targets: Tensor) -> Tensor:
        if tokens.shape[1] != shape.max_seq_len:
            raise ValueError(f"{NAME} takes sequences of max_seq_len={shape.max_seq_len}, not {tokens.shape[1]} tokens")
        loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())
        loss.backward()
        return loss.detach()

    return Step(model, forward_backward, lambda: whole_gradients(model, names, rename))
