"""The shapes in closed form are those of the models that are built, and the copies those of their placements."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.proofs.cases import VARIANTS, gpt, llama
from tpformer import GPT, Axis, Llama, Mesh, ParallelConfig, placements
from tpformer.models.decoder import Part
from tpformer.models.gpt import GPTConfig
from tpformer.planner import shapes
from tpformer.planner.candidate import Candidate
from tpformer.planner.shapes import block_shapes, count, end_copies, end_shapes

MODELS: dict[str, Any] = VARIANTS | {
    "every option": llama(num_kv_heads=1, head_dim=6, qk_norm=True, qkv_bias=True, out_bias=True, vocab_size=300),
    "gpt, wide": gpt(vocab_size=1000, ffn_hidden_size=44, max_seq_len=9),
}
ENDS = [(True, True), (True, False), (False, True), (False, False)]


def built(model: Any, mesh: Mesh, first: bool, last: bool) -> torch.nn.Module:
    """On the meta device; a mesh without processes is enough for shapes."""
    kind: Any = GPT if isinstance(model, GPTConfig) else Llama
    return kind(model, mesh, seed=None, part=Part((0, 1), first, last))


def candidate(model: Any, tp: int, sequence_parallel: bool = False) -> Candidate:
    return Candidate(model, ParallelConfig(tp=tp, dp=1, sequence_parallel=sequence_parallel), 8, 1, 1)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_its_shape_and_its_place(name: str, tp: int) -> None:
    case = candidate(MODELS[name], tp)
    for first, last in ENDS:
        model = built(MODELS[name], Mesh(tp=Axis("tp", tp)), first, last)
        before, after = end_shapes(case.model, tp, first, last)
        blocks = [(f"blocks.{i}.{n}", shape) for i in (0, 1) for n, shape in block_shapes(case.model, tp).items()]
        expected = [*before.items(), *blocks, *after.items()]
        assert [(n, tuple(p.shape)) for n, p in model.named_parameters()] == expected
        total = 2 * count(block_shapes(case.model, tp)) + count(before) + count(after)
        assert sum(p.numel() for p in model.parameters()) == total


def copies_of(model: torch.nn.Module, mesh: Mesh) -> list[tuple[str | int, ...]]:
    """What `sum_partial` would sum, of the placements."""
    found: list[tuple[str | int, ...]] = []
    for name, placement in placements(model, mesh).items():
        for piece, _, ours in placement.slices() if placement.partial else ():
            if piece.copies > 1:
                view = model.get_parameter(name)[ours]
                different = mesh.tp.size // piece.copies
                found.append(
                    (name, len(model.get_parameter(name)), ours[0].start, len(view), view[0].numel(), different)
                )
    return found


def said(case: Candidate, first: bool, last: bool) -> list[tuple[str | int, ...]]:
    layout = (case.model, case.parallel.tp, case.parallel.sequence_parallel)
    copies = [replace(c, name=f"blocks.{i}.{c.name}") for i in (0, 1) for c in shapes.block_copies(*layout)]
    copies += end_copies(*layout, first, last)
    return [(c.name, c.length, c.start, c.rows, c.width, c.different) for c in copies]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_copies_are_those_of_the_placements(name: str, tp: int, sequence_parallel: bool) -> None:
    for first, last in ENDS:
        for rank in range(tp):
            mesh = Mesh(tp=Axis("tp", tp, rank), sequence_parallel=sequence_parallel)
            found = copies_of(built(MODELS[name], mesh, first, last), mesh)
            assert sorted(found) == sorted(said(candidate(MODELS[name], tp, sequence_parallel), first, last))


def test_a_copy_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: no rows of keys and values."""
    model, mesh = MODELS["every option"], Mesh(tp=Axis("tp", 2))
    monkeypatch.setattr(shapes, "block_copies", lambda *_: ())
    assert sorted(copies_of(built(model, mesh, True, True), mesh)) != sorted(said(candidate(model, 2), True, True))
