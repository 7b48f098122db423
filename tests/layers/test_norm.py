"""The norms against torch's at any layout; and that their partial gradients must be declared, or the error is seen."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import Ranks
from tests.layers.prove import Results, evaluate, fill, gradient, meshes, noise, on_layouts, prove, take
from tpformer import LayerNorm, Mesh, RMSNorm, full_gradient, reduce_partial_gradients, trace_communication

B, S, D = 2, 8, 7
KINDS = {"rms": (RMSNorm, nn.RMSNorm), "layer": (LayerNorm, nn.LayerNorm)}


def build(kind: str, mesh: Mesh, dtype: torch.dtype = torch.float64) -> RMSNorm | LayerNorm:
    norm: RMSNorm | LayerNorm = KINDS[kind][0](D, 1e-3, mesh=mesh).to(dtype)
    fill(norm, mesh)
    return norm


def run(kind: str) -> Results:
    def case(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
        x, dy = noise("x", B, S, D).to(dtype), noise("dy", B, S, D).to(dtype)
        return evaluate(build(kind, mesh, dtype), x, dy, mesh)

    return on_layouts(case)


@pytest.mark.parametrize("kind", KINDS)
def test_is_torch_s(ranks: Ranks, kind: str) -> None:
    norm = KINDS[kind][1](D, 1e-3).double()
    fill(norm, Mesh())
    x = noise("x", B, S, D).requires_grad_()
    y = norm(x)
    y.backward(noise("dy", B, S, D))
    gradients = {name: gradient(p) for name, p in norm.named_parameters()}
    prove(ranks, run, {"y": y, "dx": gradient(x), **gradients}, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_begins_as_torch_s_does(kind: str) -> None:
    for name, theirs in KINDS[kind][1](D).named_parameters():
        assert torch.equal(KINDS[kind][0](D).get_parameter(name), theirs)
    assert KINDS[kind][0](D).eps == 1e-5


def run_undeclared(kind: str, declared: bool) -> list[str]:
    """What full_gradient says of a norm whose gradient is partial, declared so or not."""
    answers = []
    for layout, mesh in meshes().items():
        if "sequence" not in layout:
            continue
        norm = build(kind, mesh)
        norm.placements = {name: replace(p, partial=declared) for name, p in norm.placements.items()}
        norm(take(noise("x", B, S, D), "tokens", mesh)).backward(take(noise("dy", B, S, D), "tokens", mesh))
        reduce_partial_gradients(norm)
        try:
            full_gradient(norm, "weight")
            answers.append("whole")
        except RuntimeError as error:
            answers.append(str(error))
    return answers


@pytest.mark.parametrize("kind", KINDS)
def test_a_partial_gradient_that_is_not_declared_is_an_error(ranks: Ranks, kind: str) -> None:
    """Negative control: under sequence parallelism each rank's gradient is that of its own tokens."""
    for answers in ranks(run_undeclared, 4, kind, False):
        assert len(answers) == 2
        assert all(answer.startswith("copies of this tensor differ") for answer in answers)
    assert ranks(run_undeclared, 4, kind, True) == [["whole", "whole"]] * 4


def test_partial_by_default_where_ranks_see_other_tokens() -> None:
    plain, sequence_parallel = Mesh(), Mesh(sequence_parallel=True)
    for kind in (RMSNorm, LayerNorm):
        assert not any(p.partial for p in kind(D, mesh=plain).placements.values())
        assert all(p.partial for p in kind(D, mesh=sequence_parallel).placements.values())
    assert RMSNorm(D, mesh=plain, partial_gradient=True).placements["weight"].partial
    assert not RMSNorm(D, mesh=sequence_parallel, partial_gradient=False).placements["weight"].partial


def run_counts() -> list[tuple[int, int]]:
    counts = []
    for mesh in meshes().values():
        norms = nn.Sequential(*(build(kind, mesh) for kind in ("layer", "rms", "rms", "layer")))
        with trace_communication() as computing:
            norms(take(noise("x", B, S, D), "tokens", mesh)).backward(take(noise("dy", B, S, D), "tokens", mesh))
        with trace_communication() as reducing:
            reduce_partial_gradients(norms)
        counts.append((len(computing.calls), len(reducing.calls)))
    return counts


def test_partial_gradients_of_many_norms_are_one_all_reduce(ranks: Ranks) -> None:
    assert run_counts() == [(0, 0), (0, 0)]
    for counts in ranks(run_counts, 4):
        assert counts == [(0, 0), (0, 1), (0, 0), (0, 1)]
