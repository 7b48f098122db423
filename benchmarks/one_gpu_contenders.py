"""Who is compared on one device: the same Llama, with the same weights, in each way there is to run it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.peers.huggingface import HuggingFaceLlama, liger_kernels
from benchmarks.peers.plain import PlainLlama, PlainLlamaConfig, load_from_tpformer
from tpformer import Llama, LlamaConfig, Mesh, full_parameter

Compiler = Literal["inductor", "aot_eager", "none"]
Kernels = Literal["auto", "torch"]  # on where they can run, or off


@dataclass(frozen=True)
class Setting:
    """What all contenders of one comparison share."""

    config: PlainLlamaConfig
    batch: int
    device: torch.device
    dtype: torch.dtype
    compiler: Compiler
    seed: int

    @property
    def tokens(self) -> int:
        """Tokens in a step; every sequence is as long as the model allows."""
        return self.batch * self.config.max_seq_len

    def tpformer_config(self, backend: Kernels = "auto") -> LlamaConfig:
        """The shape as tpformer's own config."""
        return LlamaConfig(**asdict(self.config), backend=backend)


@dataclass(frozen=True)
class Contender:
    """A model ready to be stepped; the first layer's first norm has the gradient that passed all others."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    first_norm: nn.Parameter

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward of (b, s) tokens from no gradients; the detached loss."""
        self.model.zero_grad(set_to_none=True)
        loss = self.loss(tokens, targets)
        loss.backward()
        return loss.detach()


Weights = dict[str, Tensor]
Builder = Callable[[Setting, Weights], Contender]


def initial_weights(setting: Setting) -> Weights:
    """Every parameter of tpformer's model by its name there; the other contenders start from these."""
    model = tpformer_model(setting, "torch")
    return {name: full_parameter(model, name).detach() for name, _ in model.named_parameters()}


def tpformer_model(setting: Setting, backend: Kernels) -> Llama:
    """tpformer's Llama, whose initial weights depend on the seed only."""
    model = Llama(setting.tpformer_config(backend), Mesh(device=setting.device), seed=setting.seed)
    return model.to(setting.dtype)


def plain(setting: Setting, weights: Weights) -> Contender:
    """The Llama in plain torch."""
    with torch.device(setting.device):
        model = PlainLlama(setting.config).to(setting.dtype)
    load_from_tpformer(model, weights)
    return Contender(model, model.loss, model.get_parameter("blocks.0.attention_norm.weight"))


def tpformer(setting: Setting, weights: Weights, backend: Kernels = "auto") -> Contender:
    """tpformer's Llama."""
    model = tpformer_model(setting, backend)
    return Contender(model, model.loss, model.get_parameter("blocks.0.attention_norm.weight"))


def hugging_face(setting: Setting, weights: Weights, liger: bool = False) -> Contender:
    """transformers' Llama, with Liger's kernels if asked for; raises ImportError if they are not installed."""
    with torch.device(setting.device):
        model = HuggingFaceLlama(setting.config, setting.dtype, liger_kernels() if liger else nullcontext)
    model.load_from_tpformer(weights)
    return Contender(model, model.loss, model.get_parameter("causal.model.layers.0.input_layernorm.weight"))


def compiled(setting: Setting, weights: Weights, build: Builder) -> Contender:
    """Another contender with torch.compile over the whole of its loss; raises ValueError if compiling is off."""
    if setting.compiler == "none":
        raise ValueError("left out by --compiler none")
    eager = build(setting, weights)
    loss = torch.compile(eager.loss, backend=setting.compiler, dynamic=False)
    return Contender(eager.model, loss, eager.first_norm)


def all_contenders() -> dict[str, Builder]:
    """Every contender by the name that the table gives it, the reference first."""
    return {
        "plain": plain,
        "plain compiled": partial(compiled, build=plain),
        "tpformer kernels off": partial(tpformer, backend="torch"),
        "tpformer": tpformer,
        "tpformer compiled": partial(compiled, build=tpformer),
        "transformers": hugging_face,
        "transformers + Liger": partial(hugging_face, liger=True),
    }
