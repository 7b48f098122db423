"""Rotary position tables, with the scalings by which models were stretched to longer contexts."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context that a model was trained on.

    Raises ValueError for a factor below 1 or an unknown kind.
    """

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    """linear: positions divided by factor; llama3: low frequencies only; yarn: ramp between (arXiv 2309.00071)."""
    factor: float = 1.0
    """How many times longer the context becomes."""
    original_max_seq_len: int = 8192
    """Context of the unscaled model, in tokens (llama3, yarn)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths beyond original_max_seq_len / this are divided by factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_seq_len / this are kept."""
    beta_fast: float = 32.0
    """yarn: dims with more rotations than this over the original context are kept."""
    beta_slow: float = 1.0
    """yarn: dims with fewer rotations than this are divided by factor."""
    attention_factor: float | None = None
    """yarn: what cos and sin are multiplied by; by default 0.1 ln(factor) + 1."""

    def __post_init__(self) -> None:
        if self.kind not in ("none", "linear", "llama3", "yarn"):
            raise ValueError(f"rope scaling kind ({self.kind!r}) must be none, linear, llama3 or yarn")
        if self.factor < 1:
            raise ValueError(f"rope scaling factor ({self.factor}) must be at least 1")


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling = RopeScaling(), device: torch.device | None = None
) -> tuple[Tensor, float]:
    """The angle per position of each pair, (head_dim/2) fp32, and the factor on cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling.kind == "none":
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    factor = scaling.attention_factor
    return _yarn(frequencies, theta, scaling), 0.1 * math.log(scaling.factor) + 1.0 if factor is None else factor


def rope_table(length: int, head_dim: int, theta: float, scaling: RopeScaling, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, each (length, 1, head_dim/2), fp32 or the wider dtype of `like`, on its device."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequencies, factor = rope_frequencies(head_dim, theta, scaling, like.device)
    angles = torch.outer(torch.arange(length, device=like.device).float(), frequencies).unsqueeze(1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths stretched, short ones kept, a smooth blend between (Llama 3.1)."""
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)  # rotations over the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _yarn(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """A linear ramp over the dims, from kept (fast) to stretched (slow)."""
    dim = 2 * len(frequencies)

    def dim_of(rotations: float) -> float:
        return dim * math.log(scaling.original_max_seq_len / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dim_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dim_of(scaling.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, device=frequencies.device).float() - low) / (high - low or 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)
