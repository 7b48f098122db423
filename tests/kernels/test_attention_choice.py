"""Which implementation of attention runs, that it says so, and what it refuses; and what torch's tools see of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import tune_attention
from tests.kernels.attention_cases import CAUSAL, EVERYTHING, PLAIN, Shape, ours
from tests.kernels.support import DEVICE, evaluate
from tpformer_kernels import (
    AttentionOptions,
    attention,
    attention_choice,
    attention_with_lse,
    explain_attention,
    tables,
)

CU = torch.tensor([0, 3, 5], dtype=torch.int32, device=DEVICE)
MASK = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
WINDOWED = AttentionOptions(causal=True, window=2)
DROPPED = AttentionOptions(dropout=0.1)
CASES: dict[str, tuple[Shape, AttentionOptions, dict[str, Any], str, str]] = {
    "plain": (Shape(sq=5, sk=5), PLAIN, {}, "sdpa", "has all that is asked for"),
    "causal": (Shape(sq=5, sk=5), CAUSAL, {}, "sdpa", "has all that is asked for"),
    "other keys": (Shape(sq=5, sk=7), PLAIN, {}, "sdpa", "has all that is asked for"),
    "window of all": (Shape(sq=5, sk=5), replace(CAUSAL, window=5), {}, "sdpa", "has all that is asked for"),
    "causal, other keys": (Shape(sq=5, sk=7), CAUSAL, {}, "ours", "no causal mask for other numbers of keys"),
    "softcap": (Shape(sq=5, sk=5), AttentionOptions(softcap=2.0), {}, "ours", "no softcap"),
    "dropout": (Shape(sq=5, sk=5), DROPPED, {}, "ours", "no dropout by global position"),
    "key_mask": (Shape(sq=5, sk=5), PLAIN, {"key_mask": MASK}, "ours", "that key_mask leaves nothing"),
    "packed": (Shape(1, sq=5, sk=5), PLAIN, {"cu_seqlens": CU}, "ours", "no packed sequences"),
}
OURS = {"cuda": "triton", "cpu": "torch"}
"""What takes over where torch's own attention cannot."""


@pytest.mark.parametrize("name", CASES)
def test_auto_says_what_it_takes_and_takes_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shape, options, masks, choice, why = CASES[name]
    choice = OURS[DEVICE] if choice == "ours" else choice
    q, k, v = shape.inputs()
    with patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as theirs:
        y = attention(q, k, v, options, **masks, explain=True)
    line = capsys.readouterr().out.strip()
    assert line == explain_attention(q, k, options, **masks)
    assert line.startswith(f"attention: {choice}, ") and why in line
    assert theirs.called is (choice == "sdpa")
    torch.testing.assert_close(y, ours(options, **masks)(q, k, v)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("device", "name"), [("cuda", "triton"), ("cpu", "sdpa")])
def test_a_window_is_torch_s_own_on_a_cpu_only(device: str, name: str) -> None:
    """There its mask is as fast as any; on CUDA it would cost flash attention, and memory."""
    q, k, _ = Shape(sq=5, sk=5).inputs()
    with patch.object(torch.Tensor, "is_cuda", device == "cuda"):
        assert explain_attention(q, k, WINDOWED).startswith(f"attention: {name}")


def test_lse_is_ours() -> None:
    q, k, v = Shape(sq=5, sk=5).inputs()
    with patch.object(F, "scaled_dot_product_attention", side_effect=AssertionError):
        attention_with_lse(q, k, v)


def test_triton_is_what_was_asked_for() -> None:
    q, k, _ = Shape(sq=5, sk=5).inputs()
    assert explain_attention(q, k, backend="triton") == "attention: triton, asked for"
    double = q.double(), k.double()  # for which there are no kernels
    assert explain_attention(*double, EVERYTHING).startswith("attention: torch")
    wide = Shape(sq=5, sk=5, d=257).inputs()
    assert explain_attention(*wide[:2], EVERYTHING).startswith("attention: torch")
    with pytest.raises(ValueError, match=r"head_dim \(257\) must be 1 to 256"):
        attention(*wide, backend="triton")
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        attention(*double, k.double(), backend="triton")


def test_the_faster_one_is_looked_up() -> None:
    """By heads and length; what was measured to be slower, or not at all, is torch's own."""
    speedups = {"64 4/2 8": 1.3, "64 4/2 16": 0.7, "64 4/4 8": 1.0, "32 4/2 8": None}
    with (
        patch.object(attention_choice, "measurements", lambda architecture: {"speedups": speedups}),
        patch.object(attention_choice, "use_triton", lambda backend, x: True),
    ):
        for length, kv_heads, d, ours in (
            (8, 2, 64, True),
            (5, 2, 64, True),
            (4, 2, 64, False),
            (9, 2, 64, False),
            (8, 4, 64, False),
            (8, 2, 32, False),
            (8, 2, 48, False),
        ):
            q, k = torch.zeros(1, 4, length, d), torch.zeros(1, kv_heads, length, d)
            found = explain_attention(q, k, CAUSAL)
            assert found.startswith("attention: triton, measured to be the faster one" if ours else "attention: sdpa")


@pytest.mark.parametrize("architecture", tables.ARCHITECTURES)
def test_every_shape_of_the_known_models_has_a_row(architecture: int) -> None:
    """As `benchmarks.tune_attention --derive` writes them; measured or not."""
    table = attention_choice.measurements(architecture)
    assert table["architecture"] == architecture
    assert list(table["speedups"]) == [str(shape) for shape in tune_attention.shapes()]
    assert table["measured"] is not None or set(table["speedups"].values()) == {None}
    for model, heads in {"8b": (32, 8), "70b": (64, 8)}.items():
        for tp in (1, 2, 4, 8):
            assert f"128 {heads[0] // tp}/{heads[1] // tp} 8192" in table["speedups"], (model, tp)


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 5, 8)
ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "dims": (lambda: attention(Q[0], K, K), r"q \(4, 5, 8\) .* must be \(b, heads, sq, d\)"),
    "v": (lambda: attention(Q, K, K[:, :, :4]), r"v \(2, 2, 4, 8\)"),
    "batch": (lambda: attention(Q[:1], K, K), r"q \(1, 4, 5, 8\)"),
    "width": (lambda: attention(Q[..., :7], K, K), r"q \(2, 4, 5, 7\)"),
    "heads": (lambda: attention(Q[:, :3], K, K), r"heads \(3\) must be a multiple of kv_heads \(2\)"),
    "no kv heads": (lambda: attention(Q, K[:, :0], K[:, :0]), r"kv_heads \(0\)"),
    "dtype": (lambda: attention(Q, K.half(), K), r"k \(2, 2, 5, 8\) torch.float16, .* must have one dtype"),
    "key_mask": (lambda: attention(Q, K, K, key_mask=MASK[:, :4].cpu()), r"key_mask \(2, 4\) torch.bool must be"),
    "numbers": (lambda: attention(Q, K, K, key_mask=MASK.cpu().float()), r"torch.float32 must be bool"),
    "cu_seqlens": (lambda: attention(Q, K, K, cu_seqlens=CU.cpu().long()), r"cu_seqlens \(3,\) torch.int64 must be"),
    "no sequence": (lambda: attention(Q, K, K, cu_seqlens=CU[:1].cpu()), r"cu_seqlens \(1,\)"),
    "packed batch": (lambda: attention(Q, K, K, cu_seqlens=CU.cpu()), "with cu_seqlens b must be 1"),
    "backend": (lambda: attention(Q, K, K, backend="cuda"), r"backend \('cuda'\) must be one of"),  # type: ignore[arg-type]
    "scale": (lambda: AttentionOptions(scale=0.0), r"scale \(0.0\) must be above 0"),
    "window": (lambda: AttentionOptions(window=0), r"window \(0\) must be at least 1"),
    "softcap": (lambda: AttentionOptions(softcap=-1.0), r"softcap \(-1.0\)"),
    "rate": (lambda: AttentionOptions(dropout=1.0), r"dropout \(1.0\) must be at least 0 and below 1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("options", [CAUSAL, EVERYTHING], ids=["causal", "everything"])
def test_compiled(options: AttentionOptions, backend: Any) -> None:
    inputs = Shape(1, 2, 1, 5, 5).inputs()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, options, backend=backend)

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention_with_lse(q, k, v, options, backend=backend)

    for function in (call, both):
        torch.compiler.reset()
        eager = evaluate(function, inputs, 3)
        found = evaluate(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs, 3, eager.cotangents)
        for x, y in zip((*found.outputs, *found.gradients), (*eager.outputs, *eager.gradients), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [None, True])
def test_looking_the_winner_up_can_be_compiled(dynamic: bool | None) -> None:
    """As on CUDA, where it is looked up; at another length too."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, CAUSAL)

    torch.compiler.reset()
    tables.table.cache_clear()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with patch.object(attention_choice, "use_triton", lambda backend, x: True):
        for n in (5, 7, 9):
            q, k, v = Shape(1, 2, 2, n, n).inputs()
            torch.testing.assert_close(compiled(q, k, v), call(q, k, v), rtol=1e-6, atol=1e-6)


def test_operations_are_counted_as_torch_counts_its_own() -> None:
    """Forward and backward, with as many KV heads as heads and without: the whole square of scores."""

    def count(function: Callable[..., Tensor], *inputs: Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            evaluate(function, inputs, 3)
        return counter.get_total_flops()

    shape = Shape(2, 4, 2, 6, 6)
    q, k, v = shape.inputs()
    mine = count(lambda q, k, v: attention(q, k, v, CAUSAL, backend="triton"), q, k, v)
    product = 2 * 2 * 4 * 6 * 6 * 16  # of one of the two forward and five backward, with 2 sequences and 4 heads
    assert mine == 7 * product
    packed = count(
        lambda q, k, v: attention(q, k, v, CAUSAL, cu_seqlens=CU, backend="triton"), *(x[:1, :, :5] for x in (q, k, v))
    )
    assert packed == 7 * 2 * 4 * (3 * 3 + 2 * 2) * 16
