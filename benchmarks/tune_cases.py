"""What `benchmarks.tune` tries: for each key of the kernel tables the op that is timed, and the values worth trying."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.kernel_cases import (
    LLAMA_8B,
    Case,
    attention_case,
    bias_gelu_case,
    cross_entropy_case,
    dropout_add_case,
    gated_case,
    norm_case,
    rope_case,
    softmax_case,
)
from benchmarks.kernel_providers import OURS
from tpformer_kernels.norm_kernels import WIDE_BACKWARD, WIDE_FORWARD
from tpformer_kernels.softmax import WIDE

Options = dict[str, int]
NUMBERS = 2**25  # of one tensor: 64 MB in bf16, more than a cache
FEWEST_TOKENS = 4096


@dataclass(frozen=True)
class Tuned:
    """How the rows of one key are found."""

    case: Callable[[int], Case]
    """The op for rows of so many numbers."""
    direction: str
    last: int
    """The size that stands for the last row, which has no upper bound."""
    grid: dict[str, tuple[int, ...]]
    """Values to combine."""
    most: int = 128
    """Numbers of a block that a thread may hold: with more they leave the registers."""
    fewest: int = 1
    """With less, most of a program is overhead."""
    by_device: bool = False
    """Whether the grid's PROGRAMS are for each multiprocessor."""


def tokens_for(size: int) -> int:
    """Enough rows of a size to fill the memory a measurement needs."""
    return max(FEWEST_TOKENS, NUMBERS // size)


def _norm(size: int) -> Case:
    return norm_case("add_rms_norm", replace(LLAMA_8B, tokens=tokens_for(size), hidden=size), torch.bfloat16)


def _rope(size: int) -> Case:
    return rope_case("split_and_rotate", replace(LLAMA_8B, head_dim=size), torch.bfloat16)


def _gated(size: int) -> Case:
    """Its size is that of the whole output."""
    width = min(LLAMA_8B.ffn, size)
    return gated_case("gated_activation", replace(LLAMA_8B, tokens=size // width, ffn=width), torch.bfloat16)


def _bias_gelu(size: int) -> Case:
    return bias_gelu_case("bias_gelu", replace(LLAMA_8B, tokens=tokens_for(size), ffn=size), torch.bfloat16)


def _dropout_add(size: int) -> Case:
    return dropout_add_case("dropout_add", replace(LLAMA_8B, tokens=tokens_for(size), hidden=size), torch.bfloat16)


def _softmax(size: int) -> Case:
    """Not causal in effect: one head whose queries see every key but a few."""
    return softmax_case("softmax", replace(LLAMA_8B, tokens=size, heads=max(1, NUMBERS // size**2)), torch.bfloat16)


def _attention(size: int) -> Case:
    shape = replace(LLAMA_8B, tokens=8192, heads=LLAMA_8B.hidden // size, head_dim=size)
    return attention_case("attention", shape, torch.bfloat16)


def _dropped_attention(size: int) -> Case:
    """Short, because its reference keeps every score."""
    shape = replace(LLAMA_8B, tokens=2048, heads=LLAMA_8B.hidden // size, head_dim=size)
    return attention_case("attention", shape, torch.bfloat16, dropout=0.1)


def _exact_attention(size: int) -> Case:
    shape = replace(LLAMA_8B, tokens=2048, heads=LLAMA_8B.hidden // size, head_dim=size)
    return attention_case("attention", shape, torch.float32)


def _attention_keys(kernel: str, direction: str) -> dict[str, Tuned]:
    """The three keys of one attention kernel."""

    def tuned(case: Callable[[int], Case], last: int, m: tuple[int, ...], n: tuple[int, ...], stages: int) -> Tuned:
        grid = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": (4, 8), "num_stages": tuple(range(1, stages + 1))}
        return Tuned(case, direction, last, grid, most=160)

    return {
        f"attention_{kernel}": tuned(_attention, 256, (32, 64, 128), (32, 64, 128), 3),
        f"attention_{kernel}_small": tuned(_dropped_attention, 256, (32, 64), (32, 64, 128), 2),
        f"attention_{kernel}_fp32": tuned(_exact_attention, 128, (16, 32), (16, 32), 2),
    }


def _cross_entropy(size: int) -> Case:
    """Not in place, so that forward and backward can be timed apart."""
    shape = replace(LLAMA_8B, tokens=tokens_for(size), vocab=size)
    return cross_entropy_case("cross_entropy", shape, torch.bfloat16, inplace=False)


ROWS, WARPS = (1, 2, 4, 8, 16, 32), (4, 8, 16)
TUNED: dict[str, Tuned] = {
    "norm_forward": Tuned(_norm, "forward", WIDE_FORWARD, {"BLOCK_ROWS": ROWS, "num_warps": WARPS}, fewest=8),
    "norm_forward_wide": Tuned(
        _norm, "forward", 2 * WIDE_FORWARD, {"BLOCK": (2048, 4096, 8192, 16384), "num_warps": (4, 8, 16)}
    ),
    "norm_backward": Tuned(
        _norm,
        "backward",
        WIDE_BACKWARD,
        {"BLOCK_ROWS": ROWS, "PROGRAMS": (1, 2, 4, 8), "num_warps": WARPS},
        most=32,
        fewest=8,
        by_device=True,
    ),
    "norm_backward_wide": Tuned(
        _norm, "backward", 2 * WIDE_BACKWARD, {"BLOCK": (2048, 4096, 8192, 16384), "num_warps": (4, 8, 16)}
    ),
    "norm_weight_wide": Tuned(
        _norm, "backward", 2 * WIDE_BACKWARD, {"BLOCK": (256, 512, 1024), "PROGRAMS": (16, 32, 64), "num_warps": (4, 8)}
    ),
    "rope": Tuned(_rope, "both", 128, {"BLOCK_HEADS": (2, 4, 8, 16, 32), "num_warps": (1, 2, 4, 8)}),
    "gated_forward": Tuned(
        _gated, "forward", LLAMA_8B.tokens * LLAMA_8B.ffn, {"BLOCK": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)}
    ),
    "gated_backward": Tuned(
        _gated, "backward", LLAMA_8B.tokens * LLAMA_8B.ffn, {"BLOCK": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)}
    ),
    "bias_gelu_forward": Tuned(
        _bias_gelu,
        "forward",
        LLAMA_8B.ffn,
        {"BLOCK_ROWS": (1, 2, 4, 8), "BLOCK": (256, 512, 1024), "num_warps": (4, 8)},
        most=64,
        fewest=4,
    ),
    "bias_gelu_backward": Tuned(
        _bias_gelu,
        "backward",
        LLAMA_8B.ffn,
        {"BLOCK_ROWS": (2, 4, 8), "BLOCK": (128, 256, 512), "PROGRAMS": (32, 64, 128), "num_warps": (4, 8)},
        most=32,
        fewest=4,
    ),
    "dropout_add": Tuned(
        _dropout_add, "forward", LLAMA_8B.hidden, {"BLOCK": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)}
    ),
    "softmax_forward": Tuned(_softmax, "forward", WIDE, {"BLOCK_ROWS": ROWS, "num_warps": WARPS}, fewest=8),
    "softmax_forward_wide": Tuned(
        _softmax, "forward", 2 * WIDE, {"BLOCK": (2048, 4096, 8192, 16384), "num_warps": (4, 8, 16)}
    ),
    "softmax_backward": Tuned(_softmax, "backward", WIDE, {"BLOCK_ROWS": ROWS, "num_warps": WARPS}, fewest=8),
    "softmax_backward_wide": Tuned(
        _softmax, "backward", 2 * WIDE, {"BLOCK": (2048, 4096, 8192, 16384), "num_warps": (4, 8, 16)}
    ),
    **_attention_keys("forward", "forward"),
    **_attention_keys("dkdv", "backward"),
    **_attention_keys("dq", "backward"),
    "attention_delta": Tuned(_attention, "backward", 256, {"BLOCK_ROWS": ROWS, "num_warps": WARPS}),
    # PROGRAMS, which splits few rows, stays as it is: many rows are timed here
    "cross_entropy_statistics": Tuned(
        _cross_entropy, "forward", 131072, {"BLOCK": (2048, 4096, 8192, 16384, 32768), "num_warps": (4, 8, 16)}
    ),
    "cross_entropy_gradient": Tuned(
        _cross_entropy, "backward", 131072, {"BLOCK": (1024, 2048, 4096, 8192, 16384), "num_warps": (4, 8, 16)}
    ),
}


def candidates(key: str, size: int, committed: Options, multiprocessors: int) -> Iterator[Options]:
    """The committed options first, then every combination that fits; what the grid does not name stays committed."""
    yield committed
    tuned = TUNED[key]
    for values in itertools.product(*tuned.grid.values()):
        candidate = committed | dict(zip(tuned.grid, values, strict=True))
        if tuned.by_device:
            candidate["PROGRAMS"] *= multiprocessors
        if candidate != committed and tuned.fewest <= _numbers_per_thread(key, size, candidate) <= tuned.most:
            yield candidate


def _numbers_per_thread(key: str, size: int, options: Options) -> float:
    """Of the tile that one program holds."""
    if "BLOCK_M" in options:  # scores, and the sums that a loop carries
        m, n = options["BLOCK_M"], options["BLOCK_N"]
        return (m * n + (2 * n if "dkdv" in key else m) * size) / (32 * options["num_warps"])
    whole_rows = key in ("norm_forward", "norm_backward", "softmax_forward", "softmax_backward", "attention_delta")
    block = 1 << (size - 1).bit_length() if whole_rows else options.get("BLOCK", options.get("BLOCK_HEADS", 1) * size)
    return options.get("BLOCK_ROWS", 1) * block / (32 * options["num_warps"])


def work_of(key: str, size: int) -> Case:
    """The case that is timed for one row, with tpformer as its only provider."""
    case = TUNED[key].case(size)
    return replace(case, providers=tuple(provider for provider in case.providers if provider.name == OURS))
