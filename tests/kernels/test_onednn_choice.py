"""oneDNN's products are taken only where they are meant to be; what decides is timed once, and unseen."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from tests.kernels.support import replaced
from tests.kernels.test_onednn import needs_onednn
from tpformer_kernels import accumulate_, matmul, onednn


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Nothing that a test patched is remembered."""
    caches = onednn.onednn_speed, onednn.onednn_is_possible
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which oneDNN is always the faster one."""
    monkeypatch.setattr(onednn, "SMALLEST", 0)
    monkeypatch.setattr(onednn, "onednn_speed", lambda threads: 2.0)


# 1. the choice


def one_second(timed: list[Any]) -> Callable[..., float]:
    """What every product takes; those asked for are kept."""

    def seconds(product: Any, a: Tensor, b: Tensor) -> float:
        timed.append(product)
        return 1.0

    return seconds


def ones(*shape: int, **options: Any) -> Tensor:
    """Of no memory."""
    return torch.ones((), **options).expand(shape)


def test_large_products_are_onednn_s_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for speed in (2.0, 1.0, 0.5, 0.0):
        monkeypatch.setattr(onednn, "onednn_speed", lambda threads, speed=speed: speed)
        assert onednn.prefers_onednn(ones(512, 512), ones(512, 256)) == (speed > 1)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (ones(511, 512), ones(512, 256)),
        (ones(0, 512), ones(512, 256)),
        (ones(512, 512, dtype=torch.bfloat16), ones(512, 256, dtype=torch.bfloat16)),
        (ones(512, 512, dtype=torch.float64), ones(512, 256, dtype=torch.float64)),
        (ones(512, 512), ones(512, 256, dtype=torch.bfloat16)),
        (ones(512, 512, device="meta"), ones(512, 256, device="meta")),
    ],
    ids=["small", "empty", "bf16", "fp64", "mixed", "not on the CPU"],
)
def test_others_are_torch_s(a: Tensor, b: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "onednn_speed", lambda threads: 2.0)
    assert not onednn.prefers_onednn(a, b)


@pytest.mark.usefixtures("chosen")
@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")  # torch's own, of a switch that is not asked for
def test_who_switched_onednn_off_gets_none_of_it() -> None:
    a, b = torch.randn(2, 3), torch.randn(3, 4)
    assert onednn.prefers_onednn(a, b) == bool(torch.backends.mkldnn.enabled)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.prefers_onednn(a, b)


@pytest.mark.usefixtures("chosen")
# dynamo's own tracing does what autograd deprecates
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiler_sees_a_product_that_it_knows() -> None:
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    torch.compiler.reset()
    a, b = torch.randn(2, 3), torch.randn(3, 4)
    y = torch.compile(matmul, backend=keep, fullgraph=True)(a, b)
    torch.testing.assert_close(y, a @ b)
    assert len(graphs) == 1
    assert "torch.mm" in graphs[0]
    assert "onednn" not in graphs[0]


CONDITIONS: dict[str, tuple[Any, str, Any]] = {
    "": (onednn, "_vendor", lambda: "AuthenticAMD"),
    "another vendor": (onednn, "_vendor", lambda: "GenuineIntel"),
    "no AVX-512": (torch.backends.cpu, "get_cpu_capability", lambda: "AVX2"),
    "no MKL": (torch.backends.mkl, "is_available", lambda: False),
    "no oneDNN": (torch.backends.mkldnn, "is_available", lambda: False),
    "no such operator": (torch.ops, "mkldnn", SimpleNamespace()),
}


@pytest.mark.parametrize("missing", CONDITIONS)
def test_only_where_everything_is_there(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere nothing is timed; "": with everything there it is."""
    timed: list[Any] = []
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_linear_pointwise=None))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(onednn, "_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(onednn, "_seconds", one_second(timed))
    monkeypatch.setattr(*CONDITIONS[missing])
    assert onednn.onednn_is_possible() == (not missing)
    assert onednn.onednn_speed(1) == (0.0 if missing else 1.0)
    assert bool(timed) == (not missing)


def test_the_vendor_is_read_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path, **options: Any) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", lambda path, **options: "processor\t: 0\nvendor_id\t: AuthenticAMD\nx: 1\n")
    assert onednn._vendor() == "AuthenticAMD"
    for reads in (lambda path, **options: "CPU implementer\t: 0x41\n", fails):
        monkeypatch.setattr(Path, "read_text", reads)
        assert onednn._vendor() == ""


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize(("backend", "expected"), [("auto", 2), ("torch", 0)])
def test_backend_torch_is_torch_s(backend: Any, expected: int) -> None:
    taken: list[Any] = []

    def spy(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        taken.append(a)
        return torch.mm(a, b)

    with replaced("onednn_matmul", spy):
        matmul(torch.randn(2, 3), torch.randn(3, 4), backend=backend)
        accumulate_(torch.zeros(3, 4), torch.randn(2, 3), torch.randn(2, 4), True, backend=backend)
    assert len(taken) == (expected if torch.backends.mkldnn.enabled else 0)


# 2. the timing


@pytest.fixture
def possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is worth a timing, of small products."""
    monkeypatch.setattr(onednn, "onednn_is_possible", lambda: True)
    monkeypatch.setattr(onednn, "PROBE", (4, 8, 8))


@pytest.mark.usefixtures("possible")
def test_timed_once_for_a_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Any] = []
    monkeypatch.setattr(onednn, "_seconds", one_second(timed))
    for threads, expected in ((1, 16), (1, 16), (2, 32), (1, 32), (2, 32)):
        onednn.onednn_speed(threads)
        assert len(timed) == expected
    assert timed[:2] == [torch.mm, onednn.onednn_matmul], "in turn"


@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize(("mkl", "ours"), [(3.0, 1.0), (1.0, 3.0)], ids=["oneDNN is faster", "MKL is faster"])
def test_the_faster_one_is_taken(mkl: float, ours: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its best time: one slow product of either changes nothing."""
    slow = iter([100.0, 100.0])
    seconds = {torch.mm: mkl, onednn.onednn_matmul: ours}
    monkeypatch.setattr(onednn, "_seconds", lambda product, a, b: next(slow, 0.0) + seconds[product])
    assert onednn.prefers_onednn(ones(512, 512), ones(512, 256)) == (mkl > ours)
    assert onednn.onednn_speed(torch.get_num_threads()) == mkl / ours


class Seen(TorchDispatchMode):
    """Every operation, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.names.append(str(function))
        return function(*arguments, **(options or {}))


@needs_onednn
@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "seen"])
def test_nobody_counts_the_timing(hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without hiding, its operations are counted."""
    if not hidden:
        monkeypatch.setattr(onednn, "_disable_current_modes", nullcontext)
    with FlopCounterMode(display=False) as counter, Seen() as seen:
        assert onednn.onednn_speed(1) > 0
    assert (counter.get_total_flops() == 0) == hidden
    assert (not seen.names) == hidden


@needs_onednn
@pytest.mark.usefixtures("chosen")
def test_floating_point_operations_are_counted() -> None:
    """As many as torch's own; negative control: none without the formula."""
    a, b, total = torch.randn(3, 5), torch.randn(5, 7), torch.zeros(5, 11)

    def count(backend: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            matmul(a, b, torch.randn(7), backend=backend)
            accumulate_(total, a, torch.randn(3, 11), False, backend=backend)
        return counter.get_total_flops()

    assert count("auto") == count("torch") == 2 * 3 * 5 * 7 + 2 * 3 * 5 * 11
    formula = flop_registry.pop(torch.ops.tpformer.onednn_matmul)
    try:
        assert count("auto") == 0
    finally:
        flop_registry[torch.ops.tpformer.onednn_matmul] = formula
