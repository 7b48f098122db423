"""Wrong tensor parallelism, done on purpose, is seen: each control must make the parity check report a mismatch.

The same check, on the same models, finds nothing wrong in tests/proofs/test_parity.py.
"""

from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
from einops import rearrange

import tpformer
from tests.distributed import Ranks
from tests.proofs.cases import (
    TOLERANCE,
    VARIANTS,
    Layout,
    Measured,
    build_random,
    measure_model,
    mismatches,
    random_batch,
)
from tpformer import GPT, Llama, Mesh

FP64 = torch.float64
NAMES = ["gpt-tied", "qwen3-kv2-wide-heads"]


@lru_cache
def reference(variant: str) -> Measured:
    """One process, fp64."""
    return measure_model(build_random(VARIANTS[variant], Mesh(), FP64))


def wrong_names(variant: str, found: Measured) -> set[str]:
    """The names that the parity check reports."""
    return {line.split()[0] for line in mismatches(reference(variant), found, TOLERANCE[FP64])}


# 1. a partial gradient that nobody sums


def without_reduction(variant: str, layout: Layout) -> tuple[Measured, list[str]]:
    """On a rank: loss and local gradients of the parameters that are whole here; and full_gradient's complaints."""
    mesh = layout.mesh()
    model = build_random(VARIANTS[variant], mesh, FP64)
    loss = model.loss(*random_batch(model.config.vocab_size))
    loss.backward()
    found, complaints = {"loss": loss.detach().numpy()}, []
    for name, placement in tpformer.placements(model, mesh).items():
        if placement.pieces[0].copies == layout.tp:
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            found[name] = gradient.numpy()
        try:
            tpformer.full_gradient(model, name)
        except RuntimeError as error:
            complaints.append(f"{name}: {error}")
    return found, complaints


@pytest.mark.parametrize("variant", NAMES)
def test_skipping_reduce_partial_gradients_is_refused_and_wrong(variant: str, ranks: Ranks) -> None:
    for found, complaints in ranks(without_reduction, 2, variant, Layout(2, 1, True)):
        copied = found.keys() - {"loss"}
        assert {line.split(":")[0] for line in complaints} == copied
        assert all("reduce_partial_gradients" in line for line in complaints)
        expected = {name: reference(variant)[name] for name in found}
        assert mismatches({"loss": expected["loss"]}, {"loss": found["loss"]}, 1e-10) == []  # the loss tells nothing
        assert len(mismatches(expected, found, 0.05)) == len(copied) > 4  # by more than a twentieth, each


# 2. a copy that counts twice in the norm of all gradients


def norms(variant: str, layout: Layout) -> tuple[float, float]:
    """On a rank: the gradient norm over the pieces of copy 0, and over all pieces."""
    mesh = layout.mesh()
    model = build_random(VARIANTS[variant], mesh, FP64)
    model.loss(*random_batch(model.config.vocab_size)).backward()
    tpformer.reduce_partial_gradients(model)
    squares = torch.zeros(2, dtype=FP64)
    for name, placement in tpformer.placements(model, mesh).items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        for piece, _, ours in placement.slices():
            square = gradient[ours].square().sum()
            squares += torch.stack([square * (piece.copy == 0), square])
    dist.all_reduce(squares)
    return squares[0].sqrt().item(), squares[1].sqrt().item()


@pytest.mark.parametrize("layout", [Layout(4), Layout(4, 1, True)], ids=str)
@pytest.mark.parametrize("variant", [*NAMES, "llama-kv1-out-bias-gelu-yarn"])
def test_counting_copies_twice_gives_another_norm(variant: str, layout: Layout, ranks: Ranks) -> None:
    one = sum(float(np.square(g).sum()) for name, g in reference(variant).items() if name not in ("loss", "logits"))
    for unique, doubled in ranks(norms, 4, variant, layout):
        assert unique == pytest.approx(one**0.5, rel=1e-10)
        assert doubled > 1.01 * one**0.5


# 3. tensor-parallel ranks that read different batches


def different_batches(variant: str, layout: Layout) -> Measured | str:
    """On a rank: what is measured, or full_gradient's complaint."""
    model = build_random(VARIANTS[variant], layout.mesh(), FP64)
    try:
        return measure_model(model, seed=2 + dist.get_rank())
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("variant", NAMES)
def test_ranks_with_different_batches_are_seen(variant: str, sequence_parallel: bool, ranks: Ranks) -> None:
    for found in ranks(different_batches, 2, variant, Layout(2, 1, sequence_parallel)):
        if isinstance(found, str):
            assert "copies of this tensor differ" in found
        else:
            assert wrong_names(variant, found) == reference(variant).keys()


# 4. fused weights kept as blocks, q|k|v and gate|up, and split in a row


def blocked(layout: Layout) -> Measured:
    """On a rank: a Llama whose checkpoint holds blocks, each rank taking its local rows for blocks too."""
    mesh = layout.mesh()
    model = build_random(VARIANTS["llama-heads-untied"], mesh, FP64)
    whole = {name: tpformer.full_parameter(model, name) for name, _ in model.named_parameters()}
    to_blocks(whole, heads=4)
    tpformer.load_full_state(model, whole)
    local = {name: p.data for name, p in model.named_parameters()}
    from_blocks(local, heads=4 // layout.tp)
    return measure_blocked(model)


def to_blocks(weights: dict[str, torch.Tensor], heads: int) -> None:
    """(head, q|k|v) rows to (q|k|v, head), and (feature, gate|up) rows to (gate|up, feature), in place."""
    for name, weight in weights.items():
        if "qkv" in name:
            weight.copy_(rearrange(weight, "(h three k) d -> (three h k) d", h=heads, three=3))
        if "gate_up" in name:
            weight.copy_(rearrange(weight, "(f two) d -> (two f) d", two=2))


def from_blocks(weights: dict[str, torch.Tensor], heads: int) -> None:
    """The way back, in place, for this many heads."""
    for name, weight in weights.items():
        if "qkv" in name:
            weight.copy_(rearrange(weight, "(three h k) d -> (h three k) d", h=heads, three=3))
        if "gate_up" in name:
            weight.copy_(rearrange(weight, "(two f) d -> (f two) d", two=2))


def measure_blocked(model: GPT | Llama) -> Measured:
    """Loss and logits only: the gradients have the layout of the weights."""
    found = measure_model(model)
    return {name: found[name] for name in ("loss", "logits")}


def test_blocks_of_fused_weights_are_right_on_one_rank_and_scrambled_on_two(ranks: Ranks) -> None:
    expected = {name: reference("llama-heads-untied")[name] for name in ("loss", "logits")}
    assert mismatches(expected, ranks(blocked, 1, Layout(1))[0], 1e-10) == []
    for found in ranks(blocked, 2, Layout(2)):
        assert len(mismatches(expected, found, 1e-3)) == 2
