"""What is to be measured: jobs, which are runs of one layout, and series, which are jobs of growing degree."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.peers.plain import PlainLlamaConfig
from benchmarks.scaling_presets import Model, Preset
from tpformer.mesh import divide
from tpformer.models.gpt import GPTConfig
from tpformer.models.llama import LlamaConfig

AxisName = Literal["tp", "pp", "dp"]
Mode = Literal["strong", "weak"]

OURS: dict[str, dict[str, Any]] = {
    "tpformer": {},
    "tpformer_sp": {"sequence_parallel": True},
    "tpformer_fsdp": {"dp_mode": "fsdp"},
}
"""Kinds that are this library, and what of ParallelConfig each sets; the others are drivers in benchmarks.peers."""


@dataclass(frozen=True)
class Job:
    """One kind of model on `degree` processes, split over one axis."""

    kind: str
    axis: AxisName
    degree: int
    model: Model
    batch: int
    """Samples of a step, over all replicas; each is as long as the model allows."""
    micro: int
    """Samples of one forward of a replica."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    projected: bool = False
    """One rank's share on one process, whose collectives do nothing."""
    seed: int = 0

    @property
    def processes(self) -> int:
        """How many are launched."""
        return 1 if self.projected else self.degree

    @property
    def label(self) -> str:
        """Kind and degree, for people."""
        return f"{self.kind} {self.axis}={self.degree}{' PROJECTED' * self.projected}"

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.model.max_seq_len

    @property
    def flops(self) -> int:
        """Model FLOPs of forward and backward of a step, without recomputation."""
        return self.tokens * self.sizes().flops_per_token(self.model.max_seq_len)

    def sizes(self) -> LlamaConfig | GPTConfig:
        """tpformer's configuration of the model."""
        return LlamaConfig(**vars(self.model)) if isinstance(self.model, PlainLlamaConfig) else self.model

    def to_json(self) -> str:
        """For the command line of its processes."""
        return json.dumps(asdict(self) | {"family": type(self.model).__name__})

    @classmethod
    def from_json(cls, text: str) -> Job:
        """What `to_json` wrote."""
        fields = json.loads(text)
        family: Any = {"PlainLlamaConfig": PlainLlamaConfig, "GPTConfig": GPTConfig}[fields.pop("family")]
        return cls(**fields | {"model": family(**fields["model"])})


@dataclass(frozen=True)
class Series:
    """One kind over one axis, a job for each degree, the smallest first."""

    kind: str
    axis: AxisName
    mode: Mode
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Wish:
    """What of a preset is to be measured."""

    kinds: tuple[str, ...]
    axes: tuple[AxisName, ...]
    degrees: tuple[int, ...]
    modes: tuple[Mode, ...]
    dtype: Literal["float32", "bfloat16"] = "float32"
    projected: tuple[tuple[AxisName, int], ...] = ()
    """Axes and degrees that one process stands for."""


def axes_of(kind: str) -> tuple[str, ...]:
    """The axes that a kind can be split over; of a driver that cannot be imported, tp, where it will say why.

    Raises ValueError for a kind that is not there.
    """
    ours = {"tpformer": ("tp", "pp", "dp"), "tpformer_sp": ("tp",), "tpformer_fsdp": ("dp",)}
    if kind in ours:
        return ours[kind]
    if importlib.util.find_spec(f"benchmarks.peers.{kind}") is None:
        raise ValueError(f"kind ({kind!r}) must be one of {', '.join(ours)} or a module of benchmarks.peers")
    try:
        return (importlib.import_module(f"benchmarks.peers.{kind}").AXIS,)
    except Exception:  # whatever a foreign package raises
        return ("tp",)


def plan(preset: Preset, wish: Wish) -> list[Series]:
    """Every series that the kinds can have; plain has one process only.

    Raises ValueError for a degree that the preset cannot be split by.
    """
    found = []
    for kind in wish.kinds:
        for axis in (axis for axis in wish.axes if axis in axes_of(kind)):
            one_process = kind == "plain"
            degrees = {1} if one_process else {*wish.degrees, *(n for a, n in wish.projected if a == axis)}
            for mode in wish.modes[:1] if one_process else wish.modes:
                jobs = tuple(job_of(preset, wish, kind, (axis, degree), mode) for degree in sorted(degrees))
                found.append(Series(kind, axis, mode, jobs))
    return found


def job_of(preset: Preset, wish: Wish, kind: str, place: tuple[AxisName, int], mode: Mode) -> Job:
    """The job of a kind at one axis and degree."""
    axis, degree = place
    model, batch = preset.model_of(axis, degree, mode), preset.batch_of(axis, degree, mode)
    micro = divide(batch, degree if axis == "dp" else 1, "batch", "dp")
    if axis == "pp":
        micro = divide(batch, preset.micro_batches, "batch", "micro-batches")
    projected = place in wish.projected and degree > 1
    # one process is the same on every axis, if its micro-batches are
    return Job(kind, axis if degree > 1 else "tp", degree, model, batch, micro, wish.dtype, projected)


def jobs_of(series: Sequence[Series]) -> list[Job]:
    """Every job once, in order of first appearance."""
    return list(dict.fromkeys(job for line in series for job in line.jobs))
