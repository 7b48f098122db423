"""matmul and accumulate_ against fp64: every option, dtype and layout, in memory that is NaN around the numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.support import DEVICE, close
from tests.kernels.test_onednn import needs_onednn
from tpformer_kernels import accumulate_, matmul, matmul_activation, onednn

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""bf16 rounds the product and, once more, the sum with the residual."""
DTYPES = list(TOLERANCE)
SIZES = [(5, 7, 3), (1, 300, 33), (17, 1, 1), (4, 0, 5), (0, 4, 5), (64, 96, 32)]
OPTIONS = [(bias, residual, out) for bias in (False, True) for residual in (False, True) for out in (False, True)]
Size = tuple[int, int, int]


@pytest.fixture(params=["auto", "torch", pytest.param("oneDNN", marks=needs_onednn)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backends, and "auto" where large fp32 products of a CPU are oneDNN's."""
    if request.param == "oneDNN":
        monkeypatch.setattr(onednn, "SMALLEST", 0)
        monkeypatch.setattr(onednn, "onednn_speed", lambda threads: 2.0)
    return "auto" if request.param == "oneDNN" else request.param


def numbers(shape: tuple[int, ...], dtype: torch.dtype, gaps: bool) -> Tensor:
    """Random numbers, with gaps every other one of a tensor that is NaN otherwise."""
    whole = torch.full((*shape[:-1], (1 + gaps) * shape[-1]), torch.nan, dtype=dtype, device=DEVICE)
    return whole[..., :: 1 + gaps].copy_(torch.randn(shape, dtype=torch.float64, device=DEVICE))


# 1. matmul


def check(product: Callable[..., Tensor], size: Size, dtype: torch.dtype, options: Any, gaps: bool = False) -> None:
    """The product is fp64's; its inputs stay as they are, and so does what lies between the numbers of `out`."""
    m, k, n = size
    given = dict(zip(("bias", "residual", "out"), options, strict=True))
    shapes = {"bias": (n,), "residual": (m, n), "out": (m, n)}
    a, b = numbers((k, m), dtype, gaps).t(), numbers((k, n), dtype, gaps)
    others = {name: numbers(shapes[name], dtype, gaps) for name in shapes if given[name]}
    if "out" in others:
        others["out"].fill_(torch.nan)
    inputs = [a, b, *(x for name, x in others.items() if name != "out")]
    before = [x.clone() for x in inputs]
    y = product(a, b, **others)
    assert all(torch.equal(x, old) for x, old in zip(inputs, before, strict=True)), "an input was written to"
    expected = sum((x.double() for name, x in others.items() if name != "out"), a.double() @ b.double())
    assert y.dtype == dtype and y.shape == (m, n)
    close(y, expected, TOLERANCE[dtype])
    if "out" in others:
        assert y is others["out"]
        assert not gaps or bool(y.as_strided((y.numel(),), (2,), 1)[:-1].isnan().all())


@pytest.mark.parametrize("gaps", [False, True], ids=["dense", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul_is_fp64_s(backend: Any, dtype: torch.dtype, gaps: bool) -> None:
    for size in SIZES:
        for options in OPTIONS:
            check(lambda *x, **others: matmul(*x, backend=backend, **others), size, dtype, options, gaps)


def sum_in_bf16(a: Tensor, b: Tensor) -> Tensor:
    """A running sum that is rounded at every step."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    for i in range(a.shape[1]):
        total += a[:, i, None] * b[i]
    return total


def forgets_what_was_there(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    out += matmul(a, b)
    return out


WRONG: dict[str, tuple[Callable[..., Tensor], torch.dtype, tuple[bool, bool, bool]]] = {
    "bias forgotten": (lambda a, b, bias: a @ b, torch.float32, (True, False, False)),
    "residual forgotten": (lambda a, b, residual: a @ b, torch.float32, (False, True, False)),
    "residual written to": (lambda a, b, residual: residual.add_(a @ b), torch.float32, (False, True, False)),
    "out not written": (lambda a, b, out: out, torch.float32, (False, False, True)),
    "out added to": (forgets_what_was_there, torch.float32, (False, False, True)),
    "another tensor than out": (lambda a, b, out: out.copy_(a @ b).clone(), torch.float32, (False, False, True)),
    "bf16 sums": (sum_in_bf16, torch.bfloat16, (False, False, False)),
    "another dtype": (lambda a, b: (a @ b).double(), torch.float32, (False, False, False)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_matmul_is_seen(name: str) -> None:
    """Negative controls."""
    product, dtype, options = WRONG[name]
    with pytest.raises(AssertionError):
        check(product, (1, 300, 33), dtype, options)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, device=DEVICE)


A, B = torch.zeros(5, 4), torch.zeros(4, 7)
ACTIVATED: dict[str, tuple[Callable[[], object], str]] = {
    "k": (lambda: matmul_activation(A, B[:3], None, "gelu"), r"a \(5, 4\) must be \(m, k\) and b \(3, 7\)"),
    "bias": (lambda: matmul_activation(A, B, torch.zeros(6), "gelu"), r"bias \(6,\) must be \(7,\)"),
    "pairs": (lambda: matmul_activation(A, B, None, "silu", gated=True), r"b \(4, 7\) must have an even number"),
    "gelu": (lambda: matmul_activation(A, B, None, "silu"), r"activation \('silu'\) must be one of gelu, gelu_tanh"),
    "gate": (lambda: matmul_activation(A, B, None, "relu", gated=True), r"activation \('relu'\) must be one of silu"),
}


@pytest.mark.parametrize("name", ACTIVATED)
def test_what_an_activation_cannot_follow_is_named(name: str) -> None:
    call, message = ACTIVATED[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ((3, 4), (5, 6), {}, r"a \(3, 4\) must be \(m, k\) and b \(5, 6\) \(k, n\)"),
        ((2, 3, 4), (4, 6), {}, r"a \(2, 3, 4\) must be \(m, k\)"),
        ((3, 4), (4,), {}, r"b \(4,\) \(k, n\)"),
        ((3, 4), (4, 6), {"bias": (1,)}, r"bias \(1,\) must be \(6,\)"),
        ((3, 4), (4, 6), {"bias": (3, 6)}, r"bias \(3, 6\) must be \(6,\)"),
        ((3, 4), (4, 6), {"residual": (6,)}, r"residual \(6,\) must be \(3, 6\)"),
        ((3, 4), (4, 6), {"residual": (1, 6)}, r"residual \(1, 6\) must be \(3, 6\)"),
        ((3, 4), (4, 6), {"out": (2, 3, 6)}, r"out \(2, 3, 6\) must be \(3, 6\)"),
        ((3, 4), (4, 6), {"out": (4, 6)}, r"out \(4, 6\) must be \(3, 6\)"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_named(backend: Any, a: Any, b: Any, options: Any, message: str) -> None:
    """Some of these torch would broadcast or resize, and oneDNN read beyond."""
    others: dict[str, Any] = {name: zeros(*shape) for name, shape in options.items()}
    with pytest.raises(ValueError, match=message):
        matmul(zeros(*a), zeros(*b), backend=backend, **others)


# 2. accumulate_


Accumulate = Callable[[Tensor, Tensor, Tensor, bool], None]


def room(kind: str, m: int, n: int, dtype: torch.dtype) -> Tensor:
    """NaN (m, n), whose rows or numbers lie apart."""
    if kind == "every other row":
        return torch.full((m, 2, n), torch.nan, dtype=dtype, device=DEVICE)[:, 1]
    if kind == "columns":
        return torch.full((m, 2 * n), torch.nan, dtype=dtype, device=DEVICE)[:, n:]
    return torch.full((m, n), torch.nan, dtype=dtype, device=DEVICE)


def add_up(accumulate: Accumulate, size: Size, dtypes: tuple[torch.dtype, torch.dtype], kind: str, parts: int) -> None:
    """The sum of the products of several parts is fp64's, rounded as the total's dtype is and no more."""
    m, k, n = size
    total = room(kind, m, n, dtypes[1])
    expected = torch.zeros(m, n, dtype=torch.float64, device=DEVICE)
    for part in range(parts):
        a, b = (numbers((k, width), dtypes[0], gaps=kind != "dense") for width in (m, n))
        accumulate(total, a, b, part == 0)
        expected += a.double().t() @ b.double()
    close(total, expected, TOLERANCE[dtypes[1]])


NARROW = (torch.bfloat16, torch.float32)
SAME = [(dtype, dtype) for dtype in (torch.float32, torch.float64)]
WIDER = [NARROW, *([(torch.float32, torch.float64)] if DEVICE == "cpu" else [])]
"""Totals that are wider than the factors; CUDA has no fp64 sum of an fp32 product."""


@pytest.mark.parametrize("kind", ["dense", "every other row", "columns"])
@pytest.mark.parametrize("dtypes", [*SAME, *WIDER], ids=str)
def test_accumulate_is_fp64_s(backend: Any, dtypes: tuple[torch.dtype, torch.dtype], kind: str) -> None:
    for size in SIZES:
        for parts in (1, 3):
            add_up(lambda *x: accumulate_(*x, backend=backend), size, dtypes, kind, parts)


def by_hand(total: Tensor, product: Tensor, first: bool) -> None:
    total.copy_(product if first else total + product)


def test_a_sum_by_hand_is_right() -> None:
    """What is wrong below with the rounded one is that it is rounded."""
    for dtypes in (*SAME, NARROW):
        add_up(
            lambda t, a, b, first: by_hand(t, a.to(t.dtype).t() @ b.to(t.dtype), first), (5, 7, 3), dtypes, "dense", 3
        )


WRONG_SUMS: dict[str, tuple[Accumulate, tuple[torch.dtype, torch.dtype]]] = {
    "what was there is kept": (lambda total, a, b, first: accumulate_(total, a, b, False), SAME[0]),
    "parts are lost": (lambda total, a, b, first: accumulate_(total, a, b, True), SAME[0]),
    "products are rounded to bf16": (lambda total, a, b, first: by_hand(total, a.t() @ b, first), NARROW),
    "a copy is added to": (lambda total, a, b, first: accumulate_(total.clone(), a, b, first), SAME[0]),
}


@pytest.mark.parametrize("name", WRONG_SUMS)
def test_a_wrong_sum_is_seen(name: str) -> None:
    """Negative controls."""
    accumulate, dtypes = WRONG_SUMS[name]
    with pytest.raises(AssertionError):
        add_up(accumulate, (5, 7, 3), dtypes, "dense", 3)


@pytest.mark.parametrize(
    ("total", "a", "b"),
    [((4, 6), (3, 4), (2, 6)), ((4, 5), (3, 4), (3, 6)), ((2, 4, 6), (3, 4), (3, 6)), ((4,), (3, 4), (3,))],
    ids=str,
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_totals_that_do_not_fit_are_named(backend: Any, total: Any, a: Any, b: Any, first: bool) -> None:
    """torch would resize the total, or broadcast into it."""
    with pytest.raises(ValueError, match=r"total \(.*\) must be \(m, n\), a \(3, 4\) \(k, m\) and b \(.*\) \(k, n\)"):
        accumulate_(zeros(*total), zeros(*a), zeros(*b), first, backend=backend)
