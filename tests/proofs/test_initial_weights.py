"""Initial weights: bit for bit the same on any layout, each matrix random in its own way, and never made whole.

The spread is the one in the table of tpformer/models/init.py, within five standard errors.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tpformer
import tpformer.layers.init
from tests.distributed import Ranks
from tests.proofs.cases import LAYOUTS, VARIANTS, Config, Layout, build, gpt, llama
from tpformer import Mesh

WIDE: dict[str, Config] = {
    "gpt": gpt(hidden_size=64, ffn_hidden_size=64, tie_embeddings=False),
    "llama": llama(hidden_size=64, ffn_hidden_size=64),
    "llama-kv-copies": llama(hidden_size=64, ffn_hidden_size=64, num_kv_heads=2, tie_embeddings=True),
}
SMALLEST_MATRIX = 64 * 64  # attention.out, mlp.down and a GPT's mlp.up


def initial_weights(variant: str, layout: Layout, seed: int) -> dict[str, np.ndarray]:
    """On a rank: every parameter, whole."""
    model = build(VARIANTS[variant], layout.mesh(), seed)
    return {name: tpformer.full_parameter(model, name).numpy() for name, _ in model.named_parameters()}


@lru_cache
def one_process(variant: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every parameter of the model on one process, without the vocabulary's padding."""
    model = build(VARIANTS[variant], Mesh(), seed)
    return {name: tpformer.full_parameter(model, name) for name, _ in model.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("variant", ["gpt-untied-257-relu", "qwen2-kv2-bias-tied", "qwen3-kv4-wide-heads"])
def test_every_layout_starts_from_the_same_bits(variant: str, layout: Layout, ranks: Ranks) -> None:
    expected = one_process(variant, seed=3)
    for found in ranks(initial_weights, layout.world_size, variant, layout, 3):
        assert list(found) == list(expected)
        for name, weight in expected.items():
            assert np.array_equal(found[name], weight.numpy()), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_two_matrices_share_their_numbers(variant: str) -> None:
    """Layers, kinds of weight and seeds: any two matrices, cut to a common length, are uncorrelated."""
    streams = [one_process(variant, 0), one_process(variant, 1)]
    matrices = [w.flatten() for weights in streams for w in weights.values() if w.dim() == 2]
    length = min(len(m) for m in matrices)
    correlation = torch.corrcoef(torch.stack([m[:length] for m in matrices])) - torch.eye(len(matrices))
    assert correlation.abs().max() < 6 / math.sqrt(length)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_spread_is_the_one_of_the_table(variant: str) -> None:
    c = VARIANTS[variant]
    for name, weight in one_process(variant).items():
        if weight.dim() == 1:
            assert (weight == (0.0 if name.endswith("bias") else 1.0)).all(), name
            continue
        adds_to_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        std = c.init_std / math.sqrt(2 * c.num_layers) if adds_to_residual else c.init_std
        error = std / math.sqrt(weight.numel())
        assert weight.std().item() == pytest.approx(std, abs=5 * error / math.sqrt(2)), name
        assert weight.mean().item() == pytest.approx(0.0, abs=5 * error), name


def test_the_size_of_a_chunk_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = one_process("qwen3-kv4-wide-heads", seed=3)
    for numbers in (100, 1000):  # several rows at a time, with a rest
        monkeypatch.setattr(tpformer.layers.init, "CHUNK", numbers)
        model = build(VARIANTS["qwen3-kv4-wide-heads"], Mesh(), seed=3)
        assert all(torch.equal(tpformer.full_parameter(model, name), weight) for name, weight in expected.items())


@pytest.mark.parametrize("variant", WIDE)
def test_no_rank_allocates_a_whole_sharded_matrix(variant: str, ranks: Ranks) -> None:
    """All that is allocated while building at tp 4 is smaller than the smallest whole matrix."""
    assert max(ranks(largest_allocation, 4, variant)) < SMALLEST_MATRIX
    # the same observer sees one process, which has them whole
    assert ranks(largest_allocation, 1, variant)[0] >= SMALLEST_MATRIX


def test_the_smallest_matrix_is_what_it_is_said_to_be() -> None:
    for config in WIDE.values():
        shapes = [p.shape for name, p in build(config).named_parameters() if p.dim() == 2 and "position" not in name]
        assert min(shape.numel() for shape in shapes) == SMALLEST_MATRIX


def largest_allocation(variant: str) -> int:
    """On a rank: numbers in the largest tensor or storage that building the model makes, meta tensors included."""
    mesh = Mesh.create(tp=torch.distributed.get_world_size(), device="cpu")
    chunk, tpformer.layers.init.CHUNK = tpformer.layers.init.CHUNK, 256
    try:
        with Watch() as watch:
            build(WIDE[variant], mesh)
    finally:
        tpformer.layers.init.CHUNK = chunk
    return watch.largest


class Watch(TorchDispatchMode):
    """The most numbers in any result of any operator."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage().nbytes() // x.element_size()
                self.largest = max(self.largest, x.numel(), storage)
        return result
