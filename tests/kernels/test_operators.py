"""The kernels as operators of torch: their schemas and fakes are true, and torch.compile sees through no op."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import tpformer_kernels.matmul_ops  # noqa: F401 (registers the operators, with the package all the others)
from tests.kernels.cases import CASES
from tests.kernels.support import DEVICE, evaluate, outputs_of

OPS: Any = torch.ops.tpformer
N, D = 3, 6


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def norm_forward() -> Iterator[tuple[Any, ...]]:
    x, weight = floats(2, N, D), floats(D)
    yield x, None, weight, None, 1e-5, False
    yield x, floats(2, N, D).half(), weight, None, 1e-5, False
    yield x.half(), floats(2, N, D), weight, floats(D), 1e-5, True
    yield x.transpose(0, 1), None, weight, floats(D), 1e-5, True


def norm_backward() -> Iterator[tuple[Any, ...]]:
    dy, x, weight, statistic = floats(2, N, D), floats(2, N, D), floats(D), floats(2, N, 1)
    for total in (None, floats(2, N, D)):
        yield dy, total, x, weight, floats(0), statistic, False, True, False
        yield dy, total, x.half(), weight, statistic, statistic, True, False, True
        yield dy.transpose(0, 1), total, x.transpose(0, 1), weight, statistic, statistic, True, False, False


def cross_entropy() -> tuple[Any, ...]:
    targets = torch.tensor([2, -1, -2], device=DEVICE)
    return floats(N, D), targets, D - 1, floats(N), floats(N), floats(N), floats(N)


def rope() -> Iterator[tuple[Any, ...]]:
    qkv, cos = floats(2, N, 2, 5, D), floats(N, 1, D // 2)
    for inverse in (False, True):
        yield qkv[..., :3, :], qkv[..., 3, :], cos, cos, inverse
        yield floats(2, N, 1, 4, D), floats(2, N, 3, D).half(), cos, cos, inverse


def bias_gelu_backward() -> Iterator[tuple[Any, ...]]:
    yield floats(2, N, D), floats(2, N, D), floats(D), True, True
    yield floats(2, N, D), floats(2, N, D).half(), floats(D), False, False
    yield floats(N, D), floats(N, D).t().contiguous().t(), None, False, False


def matmul_forward() -> Iterator[tuple[Any, ...]]:
    yield floats(N, D), floats(D, 4), None, None, False
    yield floats(D, N).t(), floats(4, D).t(), floats(4), floats(4).expand(N, 4), True
    yield floats(N, D).half(), floats(D, 4).half(), None, floats(4, N).t(), False


PLAIN, EVERYTHING = (False, 0.5, None, 0.0, 0.0, 0, 0, 0, None), (True, 0.5, 4, 2.0, 0.25, -1, 1, 2, None)
DRAWN = (True, 0.5, None, 0.0, 0.25, 0, 0, 2, torch.tensor([-1, 1]))


def attention_forward() -> Iterator[tuple[Any, ...]]:
    q, k, mask = floats(2, 4, N, 16), floats(2, 2, 5, 16), torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    yield q, k, k, None, None, *PLAIN
    yield q.half(), k.half(), k.half(), mask, None, *EVERYTHING
    yield q, k, k, None, None, *DRAWN
    packing = torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE)
    yield (*(floats(1, 5, 2, 16).transpose(1, 2) for _ in range(3)), None, packing, *EVERYTHING)


def attention_backward() -> Iterator[tuple[Any, ...]]:
    for q, k, v, mask, packing, *options in attention_forward():
        o, lse = OPS.attention_forward(q, k, v, mask, packing, *options)
        for with_lse, *which in ((True, True, True), (False, True, False), (False, False, True)):
            dlse = torch.randn_like(lse) if with_lse else None
            yield torch.randn_like(o), dlse, q, k, v, o, lse, mask, packing, *options, *which


EXAMPLES: dict[str, Callable[[], Any]] = {
    "after": lambda: [(floats(N, D), floats(2)), (floats(D, N).t(), floats(N, D))],
    "accumulate_": lambda: [(floats(D, 5), floats(N, D), floats(N, 5), first) for first in (True, False)],
    "onednn_matmul": lambda: [(torch.randn(N, D), torch.randn(5, D).t(), b) for b in (None, torch.randn(5))],
    "matmul_forward": matmul_forward,
    "matmul_activated": lambda: [
        (floats(N, D), floats(4, D).t(), None if activation % 2 else floats(4), activation, False)
        for activation in range(5)
    ],
    "matmul_accumulate_": lambda: [(floats(D, 5 + gap)[:, :5], floats(N, D), floats(N, 5), gap == 0) for gap in (0, 3)],
    "attention_forward": attention_forward,
    "attention_backward": attention_backward,
    "norm_forward": norm_forward,
    "norm_backward": norm_backward,
    "rope": rope,
    "softmax_forward": lambda: [
        (floats(2, N, D), m, 0.5, c) for m in (None, floats(D).expand(2, N, D)) for c in (0, 1)
    ],
    "softmax_backward": lambda: [(floats(2, N, D), floats(2, N, D), 0.5, c) for c in (False, True)],
    "rope_pack": lambda: [(floats(2, N, 6, D), floats(2, N, 2, D), floats(2, N, 2, D), *floats(2, N, 1, D // 2))],
    "gated_forward": lambda: [(floats(2, N, D), 0), (floats(N, D).half(), 1), (floats(D, N).t(), 2)],
    "gated_backward": lambda: [(floats(N, D), floats(N, 2 * D), a) for a in range(3)],
    "bias_gelu_forward": lambda: [(floats(2, N, D), floats(D), False), (floats(D, N).half().t(), None, True)],
    "bias_gelu_backward": bias_gelu_backward,
    "dropout_add": lambda: [
        (floats(2, N, D), None, 0.25, -1, 1, 2),
        (floats(2, N, D).half(), floats(2, N, D), 0.25, 1 << 62, 1, 2),
        (floats(2, D, N).transpose(1, 2), None, 0.0, 5, 1, 2),
        (floats(2, N, D), None, 0.25, 0, 0, 2, torch.tensor([-1, 1])),
    ],
    "cross_entropy_statistics": lambda: [(*cross_entropy()[:3], s, c) for s in (True, False) for c in (0.0, 5.0)],
    "cross_entropy_gradient": lambda: [(*cross_entropy(), c) for c in (0.0, 5.0)],
    "cross_entropy_gradient_": lambda: [(*cross_entropy(), c) for c in (0.0, 5.0)],
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    # torch.compile itself does it
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def test_there_are_examples_of_every_operator() -> None:
    names = torch._C._dispatch_get_all_op_names()
    assert {name.removeprefix("tpformer::") for name in names if name.startswith("tpformer::")} == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_opcheck(name: str) -> None:
    for arguments in EXAMPLES[name]():
        results = torch.library.opcheck(getattr(OPS, name).default, arguments)
        assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_compiled(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(N, D, torch.float32)

    def call(*x: Tensor) -> tuple[Tensor, ...]:
        return outputs_of(case.ours(*x, backend=backend))

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager = evaluate(call, inputs, case.trained)
    ours = evaluate(compiled, inputs, case.trained, eager.cotangents)
    for x, y in zip((*ours.outputs, *ours.gradients), (*eager.outputs, *eager.gradients), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
        assert x.stride() == y.stride()
