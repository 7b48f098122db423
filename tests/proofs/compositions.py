"""Training at any composition of parallelisms, on a rank: three steps, and all that one process would have too."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from tests.proofs.cases import Measured, gpt, llama
from tpformer import Key, Mesh, ParallelConfig
from tpformer.placement import gather_full
from tpformer.trace import trace_communication
from tpformer.train.build import Training, build
from tpformer.train.config import DataConfig, RunConfig, TrainConfig
from tpformer.train.schedule import OptimizerConfig
from tpformer.train.step import StepOptions, train_step

MODELS: dict[str, Any] = {
    "llama": llama(num_layers=4, num_kv_heads=2, dropout=0.1, attention_dropout=0.1),
    "llama-tied": llama(num_layers=4, num_kv_heads=2, tie_embeddings=True, dropout=0.1),
    "gpt-tied": gpt(num_layers=4, dropout=0.1),
    "gpt-untied": gpt(num_layers=4, tie_embeddings=False),
    # rows that no number of replicas divides, of which some have none; keys and values copied at tp 2
    "llama-uneven": llama(num_layers=2, num_kv_heads=1, head_dim=6, qk_norm=True, qkv_bias=True, ffn_hidden_size=42),
}
BATCH, LENGTH, STEPS, VOCABULARY = 8, 8, 3, 101


@dataclass(frozen=True)
class Composition:
    """A model, a layout, and how many samples a micro-batch has."""

    model: str
    parallel: ParallelConfig
    micro_batch_size: int = 2
    dtype: torch.dtype = torch.float64
    world_size: int = field(default=1)

    def __str__(self) -> str:
        p, plain = self.parallel, ParallelConfig()
        chosen = [f"{f.name}={getattr(p, f.name)}" for f in fields(p) if getattr(p, f.name) != getattr(plain, f.name)]
        return " ".join([self.model, *chosen, f"mb={self.micro_batch_size}", str(self.dtype)[6:]])

    def alone(self) -> "Composition":
        """The same on one process."""
        precision = {"precision": self.parallel.precision, "fp32_residual": self.parallel.fp32_residual}
        return replace(self, parallel=ParallelConfig(**precision), world_size=1)  # type: ignore[arg-type]

    def config(self) -> TrainConfig[Any]:
        """The run."""
        return TrainConfig(
            model=MODELS[self.model],
            run=RunConfig(batch_size=BATCH, micro_batch_size=self.micro_batch_size, seed=3),
            data=DataConfig(seq_len=LENGTH),
            parallel=self.parallel,
            optimizer=OptimizerConfig(lr=0.01, eps=1e-4, clip_norm=0.5),
        )


def train(case: Composition) -> tuple[Measured, dict[str, int]]:
    """On a rank: losses, norms, the first step's gradients and the last step's weights, whole; the collectives."""
    with double(case.dtype):
        mesh = Mesh.of(case.parallel, "cpu")
        return steps(case, mesh, build(case.config(), mesh, VOCABULARY))


@contextmanager
def double(dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """Models are built in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def steps(case: Composition, mesh: Mesh, built: Training) -> tuple[Measured, dict[str, int]]:
    """Three steps of what was built."""
    found: Measured = {}
    if built.offload is not None:
        built.offload.least_bytes = 1  # by default nothing of models so small would move
    record_gradients(built, found, mesh)
    mine = BATCH // mesh.dp.size
    counts: dict[str, int] = {}
    for step in range(STEPS):
        with trace_communication() as trace:
            report = train_step(
                built.runner,
                built.gradients,
                built.optimizer,
                batch(step)[mesh.dp.rank * mine :][:mine],
                StepOptions(
                    micro_batch_size=case.micro_batch_size,
                    lr=0.01,
                    key=Key(5).fold("step", step),
                ),
            )
        if step == 1:
            counts = {}
            for call in trace.calls:
                counts[f"{call.op} {call.axis}"] = counts.get(f"{call.op} {call.axis}", 0) + 1
        found[f"loss {step}"], found[f"norm {step}"] = np.array([report.loss]), np.array([report.grad_norm])
    state = built.optimizer.state()
    for name in list(state):
        kind, parameter = name.split("/", 1)
        if kind == "weight":
            found[name] = whole(state[name], built, parameter, mesh)
    return found, counts


def record_gradients(built: Training, found: Measured, mesh: Mesh) -> None:
    """Have the first step's gradients, before they are clipped, put there."""
    step = built.optimizer.step

    def recording(gradients: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        if "loss 0" not in found:
            for name, gradient in gradients.items():
                found[f"gradient {name}"] = whole(gradient, built, name, mesh)
        return step(gradients, *args, **kwargs)

    built.optimizer.step = recording  # type: ignore[method-assign]


def whole(local: torch.Tensor, built: Training, name: str, mesh: Mesh) -> np.ndarray:
    """All of a tensor of which every rank has a part, on every rank that has one."""
    placement = built.optimizer.placements[name]
    return gather_full(local, placement, mesh.tp, mesh.dp_shard).numpy()


def batch(step: int) -> torch.Tensor:
    """A step's samples, int64 (8, 9), those of all replicas."""
    return torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
