"""A model whose products are all oneDNN's is the model: loss, logits, gradients and collectives."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import tpformer
from tests.distributed import Ranks
from tests.proofs.cases import TOLERANCE, Config, Layout, Measured, build_random, gpt, llama, measure_model, mismatches
from tpformer.trace import Call
from tpformer_kernels import onednn

MODELS: dict[str, Config] = {
    "llama": llama(num_kv_heads=2),
    "llama-biased": llama(qkv_bias=True, out_bias=True, tie_embeddings=True),
    "gpt": gpt(),
}
LAYOUTS = [Layout(1), Layout(2), Layout(2, 1, True)]
Run = tuple[Measured, list[Call], int]
"""What the model computed, what it communicated, and how many products were oneDNN's."""

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN, or not this operator",
)


@contextmanager
def everything_is_onednn_s(factor: float) -> Iterator[list[int]]:
    """Every product that may be; the list grows by one with each. factor: what the products are multiplied by."""
    taken: list[int] = []
    real = onednn.onednn_matmul

    def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        taken.append(1)
        return factor * real(a, b, bias)

    with ExitStack() as stack:
        stack.enter_context(patch.object(onednn, "SMALLEST", 0))
        stack.enter_context(patch.object(onednn, "onednn_speed", lambda threads: 2.0))
        for module in ("matmul", "accumulate"):
            stack.enter_context(patch.object(sys.modules[f"tpformer_kernels.{module}"], "onednn_matmul", product))
        yield taken


def compare(name: str, layout: Layout, factor: float) -> tuple[Run, Run]:
    """On a rank: torch's products, and oneDNN's."""
    runs = []
    mesh = layout.mesh()
    for backend in ("torch", "auto"):
        model = build_random(replace(MODELS[name], backend=backend), mesh, torch.float32)
        with everything_is_onednn_s(factor) as taken, tpformer.trace_communication() as trace:
            measured = measure_model(model)
        runs.append((measured, [replace(call, site="") for call in trace.calls], len(taken)))
    return runs[0], runs[1]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_the_same(name: str, layout: Layout, ranks: Ranks) -> None:
    for (torchs, calls, none), (found, same_calls, taken) in ranks(compare, layout.world_size, name, layout, 1.0):
        assert (none, taken > 20) == (0, True)
        assert mismatches(torchs, found, TOLERANCE[torch.float32]) == []
        assert calls == same_calls


def test_wrong_products_make_another_model(ranks: Ranks) -> None:
    """Negative control: by a ten thousandth."""
    for (torchs, _, _), (found, _, _) in ranks(compare, 2, "llama", Layout(2), 1.0001):
        wrong = mismatches(torchs, found, TOLERANCE[torch.float32])
        assert len(wrong) > len(found) / 2
