"""Linear and cross entropy in chunks are F.linear and F.cross_entropy of the whole logits, at any layout.

What it costs is in test_linear_cross_entropy_costs.py, how it rounds in test_linear_cross_entropy_rounding.py.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import Ranks
from tests.layers.losses import B, Case, D, S, V, reference
from tests.layers.prove import Results, gradient, interpreted, on_layouts, prove, take, whole
from tpformer import Axis, Mesh
from tpformer.collectives import Pending, start_enter_gradient
from tpformer.layers import linear_cross_entropy
from tpformer.layers.cross_entropy import LossOptions, Reduction
from tpformer.layers.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from tpformer_kernels import Backend

EVERYTHING: LossOptions = {"vocab_size": 17, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}
REDUCTIONS: list[Reduction] = ["none", "sum", "mean"]
ONE, ODD = 1, 700  # bytes a chunk: one token; and 3, 7 or 14 of the 16 tokens, by dtype and tp

CASES: dict[str, Case] = {
    "mean": Case({}),
    "sum": Case({"reduction": "sum"}, ignored=3),
    "none": Case({"reduction": "none"}, ignored=3),
    "label smoothing": Case({"label_smoothing": 0.2}),
    "all smoothing": Case({"label_smoothing": 1.0}, ignored=3),
    "z-loss": Case({"z_loss": 0.1}, ignored=3),
    "softcap": Case({"softcap": 2.0}),
    "softcap of large logits": Case({"softcap": 5.0}, scale=30),
    "some ignored": Case({}, ignored=3),
    "ignore_index in the vocabulary": Case({"ignore_index": 7}, ignored=4),
    "all ignored": Case({"z_loss": 0.1}, ignored=B * S),
    "all ignored, smoothed": Case({"label_smoothing": 0.1, "reduction": "sum"}, ignored=B * S, chunk_bytes=ODD),
    "all ignored, none": Case({"reduction": "none"}, ignored=B * S),
    "odd vocabulary": Case({"vocab_size": 23}),
    "a rank of padding only": Case({"vocab_size": 17}, chunk_bytes=ODD),
    "three ranks of padding only": Case({"vocab_size": 5, "label_smoothing": 0.2}),
    "one real column": Case({"vocab_size": 1}),
    "extreme logits": Case({}, scale=1e4),
    "one token a chunk": Case({}, ignored=3, chunk_bytes=ONE),
    "one token a chunk, none": Case({"reduction": "none"}, ignored=3, chunk_bytes=ONE),
    "odd chunks": Case({}, ignored=3, chunk_bytes=ODD),
    "odd chunks, sum": Case({"reduction": "sum"}, chunk_bytes=ODD),
    "odd chunks, none": Case({"reduction": "none"}, chunk_bytes=ODD),
    "stored by columns": Case({}, chunk_bytes=ODD, lay_out="columns"),
    "stored by columns, none": Case({"reduction": "none"}, chunk_bytes=ODD, lay_out="columns"),
    "first dims exchanged": Case({}, chunk_bytes=ODD, lay_out="exchanged"),
    "everything": Case({**EVERYTHING}, ignored=3),
    "everything, one token a chunk": Case({**EVERYTHING}, ignored=3, chunk_bytes=ONE),
    "everything, odd chunks": Case({**EVERYTHING, "ignore_index": 3}, ignored=3, chunk_bytes=ODD),
    "everything, odd chunks, none": Case({**EVERYTHING, "reduction": "none"}, ignored=3, chunk_bytes=ODD),
}


def run(name: str, backend: Backend) -> Results:
    case = CASES[name]

    def on(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
        whole_x, whole_weight, targets = case.tensors()
        x = take(whole_x, "tokens", mesh).to(dtype).detach().requires_grad_()
        weight = whole_weight.chunk(mesh.tp.size)[mesh.tp.rank].to(dtype).detach().requires_grad_()
        stored = case.laid_out(x), case.laid_out(weight)
        options: LossOptions = {**case.options, "backend": backend}
        loss = vocab_parallel_linear_cross_entropy(*stored, targets, mesh, chunk_bytes=case.chunk_bytes, **options)
        loss.backward(case.upstream().to(dtype))
        dweight = whole(gradient(weight).t(), "features", mesh).t()
        return {"loss": loss.detach(), "dx": whole(gradient(x), "tokens", mesh), "dweight": dweight}

    return on_layouts(on, backend)


# the kernels themselves have tests of their own: these are the options as they arrive from here
TRITON = ["all ignored, smoothed", "three ranks of padding only", "everything, odd chunks"]
TRITON += ["everything, odd chunks, none"]
RUNS = [(name, "torch") for name in CASES] + [pytest.param(name, "triton", marks=interpreted) for name in TRITON]


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_is_linear_and_cross_entropy_of_torch(ranks: Ranks, name: str, backend: Backend) -> None:
    prove(ranks, run, reference(CASES[name]), name, backend, backend=backend)


def run_frozen(frozen: str) -> Results:
    """Odd chunks with x or weight frozen: the other's gradient, and whether the frozen one has none."""
    case = CASES["odd chunks"]

    def on(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
        whole_x, whole_weight, targets = case.tensors()
        x = take(whole_x, "tokens", mesh).to(dtype).detach().requires_grad_(frozen != "x")
        weight = whole_weight.chunk(mesh.tp.size)[mesh.tp.rank].to(dtype).detach().requires_grad_(frozen != "weight")
        for reduction in REDUCTIONS:
            x.grad = weight.grad = None
            loss = vocab_parallel_linear_cross_entropy(x, weight, targets, mesh, chunk_bytes=ODD, reduction=reduction)
            loss.backward(torch.full(loss.shape, case.upstream().item(), dtype=dtype))
            assert (x.grad is None, weight.grad is None) == (frozen == "x", frozen == "weight")
        if frozen == "x":
            return {"dweight": whole(gradient(weight).t(), "features", mesh).t()}
        return {"dx": whole(gradient(x), "tokens", mesh)}

    return on_layouts(on)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_frozen_part_gets_no_gradient_and_leaves_the_other_s_as_it_is(ranks: Ranks, frozen: str) -> None:
    expected = reference(CASES["odd chunks"])
    name = "dx" if frozen == "weight" else "dweight"
    prove(ranks, run_frozen, {name: expected[name]}, frozen)


@pytest.fixture
def _fresh_memory_is_nan() -> Iterator[None]:
    """What is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_fresh_memory_is_nan")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, 0), (0, 4)], ids=str)
def test_no_tokens_are_a_loss_of_0_with_gradients_of_0(shape: tuple[int, int], reduction: Any) -> None:
    x = torch.zeros(*shape, D, requires_grad=True)
    weight = torch.ones(V, D, requires_grad=True)
    targets = torch.zeros(shape, dtype=torch.int64)
    loss = vocab_parallel_linear_cross_entropy(x, weight, targets, reduction=reduction)
    assert loss.shape == (shape if reduction == "none" else ())
    assert loss.sum() == 0
    loss.sum().backward()
    assert gradient(x).shape == x.shape
    assert torch.equal(gradient(weight), torch.zeros(V, D))


def test_a_second_backward_is_refused_where_the_gradients_are_gone() -> None:
    x, weight, targets = CASES["mean"].tensors()
    x.requires_grad_()
    loss = vocab_parallel_linear_cross_entropy(x, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward through this loss a second time: its gradients have been handed"):
        loss.backward()


def test_without_a_reduction_backward_may_come_twice() -> None:
    x, weight, targets = CASES["none"].tensors()
    loss = vocab_parallel_linear_cross_entropy(x.requires_grad_(), weight, targets, reduction="none").sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("lay_out", ["rows", "columns", "exchanged"])
def test_what_the_ranks_sum_is_contiguous(lay_out: str, reduction: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However x is stored: not every backend of torch.distributed takes anything else."""
    seen: list[bool] = []

    def start(partial: Tensor, mesh: Mesh) -> Pending:
        seen.append(partial.is_contiguous())
        return start_enter_gradient(partial, mesh)

    monkeypatch.setattr(linear_cross_entropy, "start_enter_gradient", start)
    case = Case({"reduction": reduction}, lay_out=lay_out)
    x, weight, targets = case.tensors()
    loss = vocab_parallel_linear_cross_entropy(case.laid_out(x).requires_grad_(), weight, targets, reduction=reduction)
    loss.sum().backward()
    assert seen == [True]


def test_what_is_given_is_left_as_it_is() -> None:
    x, weight, targets = CASES["everything, odd chunks"].tensors()
    before = x.clone(), weight.clone(), targets.clone()
    loss = vocab_parallel_linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets, chunk_bytes=ODD)
    upstream = torch.tensor(3.0, dtype=torch.float64)
    loss.backward(upstream)
    for now, then in zip((x, weight, targets, upstream), (*before, torch.tensor(3.0)), strict=True):
        assert torch.equal(now.detach(), then.to(now.dtype))


FOUR = Mesh(tp=Axis("tp", 4))
WRONG: dict[str, tuple[Callable[..., object], str]] = {
    "x of one dim": (lambda f, x, w, t: f(x[0, 0], w, t), r"x \(6,\) must be \(b, s, d\)"),
    "x of two dims": (
        lambda f, x, w, t: f(x[0], w, t),
        r"x \(8, 6\) must be \(b, s, d\) and weight \(24, 6\) \(v, d\)",
    ),
    "widths": (lambda f, x, w, t: f(x, w[:, :5], t), r"x \(2, 8, 6\) must be \(b, s, d\) and weight \(24, 5\)"),
    "weight of one dim": (lambda f, x, w, t: f(x, w[0], t), r"weight \(6,\) \(v, d\)"),
    "targets": (lambda f, x, w, t: f(x, w, t[:, :7]), r"targets \(2, 7\) must be \(b, s\), here \(2, 8\)"),
    "targets of part": (
        lambda f, x, w, t: f(x, w, t, Mesh(tp=Axis("tp", 4), sequence_parallel=True)),
        r"targets \(2, 8\) must be \(b, s\), here \(2, 32\)",
    ),
    "chunk_bytes": (lambda f, x, w, t: f(x, w, t, chunk_bytes=0), r"chunk_bytes \(0\) must be at least 1"),
    "reduction": (lambda f, x, w, t: f(x, w, t, reduction="max"), r"reduction \('max'\) must be mean, sum or none"),
    "smoothing": (lambda f, x, w, t: f(x, w, t, label_smoothing=2), r"label_smoothing \(2\) must be in 0..1"),
    "z_loss": (lambda f, x, w, t: f(x, w, t, z_loss=-0.1), r"z_loss \(-0.1\) must not be negative"),
    "softcap": (lambda f, x, w, t: f(x, w, t, softcap=-1), r"softcap \(-1\) must not be negative"),
    "vocab_size 0": (lambda f, x, w, t: f(x, w, t, vocab_size=0), r"vocab_size \(0\) must be in 1..24"),
    "vocab_size 97": (lambda f, x, w, t: f(x, w, t, FOUR, vocab_size=97), r"vocab_size \(97\) must be in 1..96"),
    "target": (lambda f, x, w, t: f(x, w, t + 17, vocab_size=17), r"target \d+ at position \d+ must be in 0..16"),
    "backend": (
        lambda f, x, w, t: f(x, w, t, backend="cuda"),
        r"backend \('cuda'\) must be one of auto, triton, torch",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(vocab_parallel_linear_cross_entropy, *CASES["mean"].tensors())
