"""The step that scaling times, of this library and of its peers: forward, backward, and the gradients' sums.

There is no optimizer step. What is summed over replicas, and over the copies of a parameter, is part of the step.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import harness
from benchmarks.peers.plain import PlainLlamaConfig
from benchmarks.scaling_jobs import OURS, Job
from tpformer import Llama, LlamaConfig, Mesh, ParallelConfig, full_parameter
from tpformer.doctor.facts import cpu_matmul
from tpformer.parallel.pipeline import Pipeline
from tpformer.train.build import Training, build
from tpformer.train.config import DataConfig, RunConfig, TrainConfig

FIRST_NORM = "blocks.0.attention_norm.weight"


@dataclass(frozen=True)
class Built:
    """A job as one rank has it."""

    mesh: Mesh
    step: Callable[[], Tensor]
    """This rank's share of the mean loss: the ranks' shares add up to it. Gradients stay."""
    first_norm: Callable[[], Tensor | None]
    """After a step, the whole gradient of the first norm's weight, if this rank has it; collective."""
    gemm_backend: str


def build_job(job: Job, device: str | None) -> Built:
    """A job's model and step; every rank of it calls this. Raises whatever a model or a package raises."""
    if job.projected:
        join_silent_group(job.degree)
    fields: dict[str, Any] = {"tp": 1, "pp": 1, "dp": 1} | {job.axis: job.degree} | OURS.get(job.kind, {})
    fields["precision"] = {"float32": "fp32", "bfloat16": "bf16"}[job.dtype]
    parallel = ParallelConfig(**fields)
    with silent_timeouts():
        mesh = Mesh.of(parallel, device)
    return ours(job, parallel, mesh) if job.kind in OURS else theirs(job, mesh)


def join_silent_group(world_size: int) -> None:
    """Become rank 0 of a process group whose other ranks do not exist and whose collectives send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)


@contextmanager
def silent_timeouts() -> Iterator[None]:
    """torch warns that a group which sends nothing has no time-out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Set timeout is now only supported")
        yield


def ours(job: Job, parallel: ParallelConfig, mesh: Mesh) -> Built:
    """A step of tpformer, by what training is made of."""
    sizes = job.sizes()
    config: TrainConfig[Any] = TrainConfig(
        model=sizes,
        run=RunConfig(batch_size=job.batch, micro_batch_size=job.micro, seed=job.seed),
        data=DataConfig(seq_len=sizes.max_seq_len),
        parallel=parallel,
    )
    built = build(config, mesh, sizes.vocab_size)
    model, runner, gradients = built.model, built.runner, built.gradients
    built = Training(model, runner, gradients, optimizer=None)  # type: ignore[arg-type]  # its memory is not a step's
    mine = job.batch // mesh.dp.size
    samples = samples_of(job)[mesh.dp.rank * mine :][:mine].to(mesh.device)
    found: dict[str, Tensor] = {}

    def step() -> Tensor:
        found.clear()
        loss, summed = forward_backward(built, samples, job.micro, mesh)
        found.update({name: part for name, part in summed.items() if name == FIRST_NORM})
        return loss / mesh.tp.size

    def first_norm() -> Tensor | None:
        gradient = found.get(FIRST_NORM)
        whole = gradient is not None and gradient.shape == (sizes.hidden_size,)
        return gradient if whole else None  # of FSDP's replicas each has a part

    return Built(mesh, step, first_norm, our_gemm_backend(mesh.device))


def forward_backward(built: Training, samples: Tensor, micro: int, mesh: Mesh) -> tuple[Tensor, dict[str, Tensor]]:
    """This replica's share of the mean loss, on the last stage of a pipeline; and the summed gradients."""
    if isinstance(built.runner, Pipeline):
        total = built.runner.backward(samples, scale=1 / mesh.dp.size) / mesh.dp.size
    else:
        total = torch.zeros((), device=mesh.device)
        parts = samples.split(micro)
        for number, part in enumerate(parts):
            loss = built.runner.loss(part[:, :-1], part[:, 1:]) / (len(parts) * mesh.dp.size)
            built.gradients.start(last=number == len(parts) - 1)
            loss.backward()
            total = total + loss.detach()
    found = built.gradients.finish()
    if isinstance(built.runner, Pipeline):
        built.runner.sum_tied(found)
    return total, found


def our_gemm_backend(device: torch.device) -> str:
    """What multiplies this library's matrices."""
    return "cuBLAS" if device.type == "cuda" else cpu_matmul() or "torch"


def theirs(job: Job, mesh: Mesh) -> Built:
    """A step of a driver in benchmarks.peers. Raises ValueError for a model that no driver has."""
    if not isinstance(job.model, PlainLlamaConfig):
        raise ValueError(f"{job.kind} has a driver for Llama only, not for {type(job.model).__name__}")
    driver = importlib.import_module(f"benchmarks.peers.{job.kind}")
    if job.degree > 1 and job.axis != driver.AXIS:
        raise ValueError(f"{job.kind} splits over {driver.AXIS}, not over {job.axis}")
    weights = initial_weights(job, mesh.device)
    step = driver.build(job.model, job.degree, mesh.device, weights)
    weights.clear()
    samples = samples_of(job).to(mesh.device)
    tokens, targets = samples[:, :-1].contiguous(), samples[:, 1:].contiguous()

    return Built(
        mesh,
        lambda: step(tokens, targets) / job.degree,  # which every rank has whole
        lambda: step.gradients()[FIRST_NORM],
        driver.gemm_backend(mesh.device),
    )


def initial_weights(job: Job, device: torch.device) -> dict[str, Tensor]:
    """Every parameter of tpformer's Llama, whole, by its name there."""
    assert isinstance(job.model, PlainLlamaConfig)
    model = Llama(LlamaConfig(**vars(job.model)), Mesh(device=device), seed=job.seed)
    dtype = getattr(torch, job.dtype)
    return {name: full_parameter(model, name).detach().to(dtype) for name, _ in model.named_parameters()}


def samples_of(job: Job) -> Tensor:
    """Random samples, int64 (batch, s + 1), the same on every rank."""
    tokens, targets = harness.random_text(
        job.model.vocab_size, job.batch, job.model.max_seq_len, job.seed, torch.device("cpu")
    )
    return torch.cat((tokens, targets[:, -1:]), dim=1)
