"""Boxes: together the ranks hold every number of every tensor of a file once, and know where."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import tpformer
from tests.models.oracle import gpt_state, llama_state
from tests.proofs.cases import VARIANTS, Config, build
from tpformer import Axis, GPTConfig, Mesh, Placement
from tpformer.checkpoint.boxes import Kept, boxes
from tpformer.checkpoint.huggingface import expected_shapes, family_of
from tpformer.checkpoint.reading import Source
from tpformer.placement import load_full, replicated


def names_of(config: Config) -> dict[str, Kept]:
    return {kept.name: kept for kept in family_of(config).names(config)}


def numbered(config: Config) -> dict[str, Tensor]:
    """Every tensor of a file, no two numbers in it the same."""
    found, first = {}, 1
    for name, shape in expected_shapes(config, names_of(config)).items():
        count = int(np.prod(shape))
        found[name] = torch.arange(first, first + count, dtype=torch.float64).view(shape)
        first += count
    return found


def whole_of(config: Config) -> dict[str, Tensor]:
    """The same numbers as our whole parameters, by the arithmetic of the tests' own oracle."""
    theirs = numbered(config)
    return gpt_state(theirs, config) if isinstance(config, GPTConfig) else llama_state(theirs, config)


def rank_placements(config: Config, tp: int, rows: int) -> list[dict[str, Placement]]:
    """Every rank's placements on tp x rows processes, of which `rows` share out what is local (FSDP)."""
    found = []
    for rank in range(tp):
        mesh = Mesh(tp=Axis("tp", tp, rank))
        model = build(config, mesh)
        known = tpformer.placements(model, mesh)
        for row in range(rows):
            lengths = {name: len(p) for name, p in model.named_parameters()}
            sizes = {name: -(-length // rows) for name, length in lengths.items()}
            found.append(
                {
                    name: place
                    if rows == 1
                    else replace(
                        place, rows=(min(row * sizes[name], lengths[name]), min((row + 1) * sizes[name], lengths[name]))
                    )
                    for name, place in known.items()
                }
            )
    return found


def local_of(whole: Tensor, placement: Placement) -> Tensor:
    """A rank's part of a parameter, without its padding."""
    sizes = list(whole.shape)
    if sizes:
        sizes[placement.dim] = sum(piece.size for piece in placement.pieces)
    if placement.rows is not None:
        sizes[0] = placement.rows[1] - placement.rows[0]
    local = torch.zeros(sizes, dtype=whole.dtype)
    load_full(local, placement, whole)
    return local


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_ranks_boxes_are_the_whole_of_every_tensor_once(variant: str, tp: int, rows: int) -> None:
    config = VARIANTS[variant]
    names, theirs, whole = names_of(config), numbered(config), whole_of(config)
    written = {name: torch.zeros_like(x) for name, x in theirs.items()}
    for known in rank_placements(config, tp, rows):
        for name, placement in known.items():
            local = local_of(whole[name], placement)
            read = -(local != 0).double()  # nothing is 0 but padding
            for box in boxes(names[name], placement):
                assert torch.equal(box.take(local), theirs[box.tensor][box.index])
                box.put(read, theirs[box.tensor][box.index])
                if not box.copy:
                    written[box.tensor][box.index] += box.take(local)
            assert torch.equal(read, local)
    assert all(torch.equal(written[name], x) for name, x in theirs.items())


def test_a_wrong_order_is_seen() -> None:
    """Negative control: keys and values exchanged."""
    config = VARIANTS["llama-8-heads-kv4-tied-257"]
    kept = names_of(config)["blocks.0.attention.qkv.weight"]
    wrong = replace(kept, tensors=(kept.tensors[0], kept.tensors[2], kept.tensors[1]))
    whole, theirs = whole_of(config)[kept.name], numbered(config)
    known = rank_placements(config, 1, 1)[0][kept.name]
    assert not all(torch.equal(box.take(whole), theirs[box.tensor][box.index]) for box in boxes(wrong, known))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_scalar(rank: int) -> None:
    known = replicated((), Axis("tp", 2, rank))
    (box,) = boxes(Kept("scale", ("theirs",)), known)
    local = torch.tensor(3.0)
    assert box.copy == (rank == 1)
    box.put(local, torch.tensor(5.0))
    assert local.item() == 5.0
    assert box.take(local).item() == 5.0


def test_padding_is_zero_and_never_in_a_box() -> None:
    config = VARIANTS["gpt-tied"]  # 101 tokens, padded to 128: the last of four ranks holds 5
    known = rank_placements(config, 4, 1)[3]["embedding.weight"]
    (box,) = boxes(names_of(config)["embedding.weight"], known)
    assert box.start == (96, 0)
    assert box.size == (5, 32)

    class Memory(Source):
        def read(self, box: object) -> Tensor:
            return torch.ones(5, 32)

    local = torch.full((32, 32), torch.nan)
    Memory({}).fill(local, [box])
    assert local[:5].eq(1).all()
    assert local[5:].eq(0).all()
