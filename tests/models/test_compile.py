"""A model's loss is one graph to torch.compile, forward and backward, and what it computes there is the eager loss."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.layers.prove import BACKENDS, gradient
from tests.proofs.cases import TOLERANCE, Config, build_random, gpt, llama, random_batch
from tpformer import GPT, Llama, Mesh

# dynamo's own tracing does what autograd deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

MODELS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama": (Llama, {"num_kv_heads": 2}),
    "llama-qk-norm-window-tied": (
        Llama,
        {"num_kv_heads": 2, "qk_norm": True, "sliding_window": 3, "tie_embeddings": True},
    ),
    "gpt": (GPT, {}),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def config(name: str, **options: Any) -> Config:
    kind, own = MODELS[name]
    return (llama if kind is Llama else gpt)(num_layers=1, **own, **options)


def train(model: GPT | Llama, loss_of: Any) -> dict[str, Tensor]:
    """The loss and every gradient."""
    model.zero_grad()
    loss = loss_of(*(x[:2] for x in random_batch(101)))
    loss.backward()
    return {"loss": loss.detach(), **{name: gradient(p).clone() for name, p in model.named_parameters()}}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_compiles_whole_and_is_the_eager_one(name: str, backend: Any) -> None:
    model = build_random(config(name, backend=backend), Mesh(), torch.float32)
    compiled = train(model, torch.compile(model.loss, fullgraph=True, backend="aot_eager"))
    for key, value in train(model, model.loss).items():
        error = (compiled[key] - value).abs().max() / value.abs().max()
        assert error <= TOLERANCE[torch.float32], f"{key} is off by {error:.1e}"
