"""The norms against torch's at any layout; and that their partial gradients must be declared, or the error is seen."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import Ranks
from tests.layers.prove import (
    BACKENDS,
    Results,
    evaluate,
    fill,
    gradient,
    meshes,
    noise,
    on_layouts,
    prove,
    take,
    whole,
)
from tpformer import LayerNorm, Mesh, RMSNorm, full_gradient, reduce_partial_gradients, trace_communication
from tpformer.layers.norm import add_norm
from tpformer_kernels import Backend

B, S, D = 2, 8, 7
KINDS = {"rms": (RMSNorm, nn.RMSNorm), "layer": (LayerNorm, nn.LayerNorm)}


def build(kind: str, mesh: Mesh, dtype: torch.dtype = torch.float64, backend: Backend = "auto") -> RMSNorm | LayerNorm:
    norm: RMSNorm | LayerNorm = KINDS[kind][0](D, 1e-3, mesh=mesh, backend=backend).to(dtype)
    fill(norm, mesh)
    return norm


def of_torch(kind: str) -> nn.RMSNorm | nn.LayerNorm:
    norm: nn.RMSNorm | nn.LayerNorm = KINDS[kind][1](D, 1e-3).double()
    fill(norm, Mesh())
    return norm


def run(kind: str, backend: Backend) -> Results:
    def case(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
        x, dy = noise("x", B, S, D).to(dtype), noise("dy", B, S, D).to(dtype)
        return evaluate(build(kind, mesh, dtype, backend), x, dy, mesh)

    return on_layouts(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_is_torch_s(ranks: Ranks, kind: str, backend: Backend) -> None:
    norm = of_torch(kind)
    x = noise("x", B, S, D).requires_grad_()
    y = norm(x)
    y.backward(noise("dy", B, S, D))
    gradients = {name: gradient(p) for name, p in norm.named_parameters()}
    prove(ranks, run, {"y": y, "dx": gradient(x), **gradients}, kind, backend, backend=backend)


USES = {"both": (1.0, 1.0), "the norm alone": (1.0, 0.0), "the sum alone": (0.0, 1.0)}


def cotangents(use: str) -> list[tuple[int, Tensor]]:
    """Which of the two outputs are used, and the gradient of each."""
    return [(i, noise(f"dy {i}", B, S, D)) for i, share in enumerate(USES[use]) if share]


def run_add(kind: str, use: str, backend: Backend, method: bool) -> Results:
    """The norm of a sum, the sum and every gradient; through the norm's own method or the function for any norm."""

    def case(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
        norm = build(kind, mesh, dtype, backend)
        x, residual = (take(noise(name, B, S, D), "tokens", mesh).to(dtype).detach() for name in ("x", "residual"))
        x.requires_grad_()
        residual.requires_grad_()
        outputs = norm(x, residual) if method else add_norm(norm, x, residual)
        used = cotangents(use)
        torch.autograd.backward([outputs[i] for i, _ in used], [take(dy, "tokens", mesh).to(dtype) for _, dy in used])
        found = {"y": outputs[0], "sum": outputs[1], "dx": gradient(x), "dresidual": gradient(residual)}
        result = {name: whole(t.detach(), "tokens", mesh) for name, t in found.items()}
        if use != "the sum alone":
            reduce_partial_gradients(norm)
            result |= {name: full_gradient(norm, name) for name, _ in norm.named_parameters()}
        return result

    return on_layouts(case, backend)


def add_then_norm(kind: str, use: str) -> dict[str, Tensor]:
    """torch's norm of the plain sum."""
    norm = of_torch(kind)
    x, residual = (noise(name, B, S, D).requires_grad_() for name in ("x", "residual"))
    total = x + residual
    outputs = norm(total), total
    used = cotangents(use)
    torch.autograd.backward([outputs[i] for i, _ in used], [dy for _, dy in used])
    gradients = {name: p.grad for name, p in norm.named_parameters() if p.grad is not None}
    return {"y": outputs[0], "sum": total, "dx": gradient(x), "dresidual": gradient(residual), **gradients}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", KINDS)
def test_after_an_add_it_is_torch_s_of_the_sum(ranks: Ranks, kind: str, use: str, backend: Backend) -> None:
    for method in (True, False):
        prove(ranks, run_add, add_then_norm(kind, use), kind, use, backend, method, backend=backend)


class Sevenfold(RMSNorm):
    """A norm derived from ours, whose own forward must not be passed over."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return 7 * super().forward(x)


@pytest.mark.parametrize(
    "norm", [of_torch("layer"), of_torch("rms"), nn.Identity(), nn.Tanh(), Sevenfold(D).double()], ids=repr
)
def test_any_other_norm_is_called_with_the_sum(norm: nn.Module) -> None:
    x, residual = (noise(name, B, S, D).requires_grad_() for name in ("x", "residual"))
    y, total = add_norm(norm, x, residual)
    assert torch.equal(total, residual + x)
    assert torch.equal(y, norm(residual + x))
    dy, dtotal = noise("dy", B, S, D), noise("dtotal", B, S, D)
    torch.autograd.backward([y, total], [dy, dtotal])
    leaf = total.detach().requires_grad_()
    norm(leaf).backward(dy)
    for part in (x, residual):
        torch.testing.assert_close(gradient(part), gradient(leaf) + dtotal, rtol=1e-12, atol=1e-12)


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
