"""What a rank's step takes, measured as train.first_steps does, with all that lay there before it."""

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor

from tests.proofs.cases import gpt, llama
from tests.proofs.compositions import double
from tpformer import Key, Mesh, ParallelConfig
from tpformer.planner.candidate import Candidate, ModelConfig
from tpformer.train.build import Training, build
from tpformer.train.config import DataConfig, RunConfig, TrainConfig
from tpformer.train.memory import MemoryPeak, measure_memory, memory_report
from tpformer.train.schedule import OptimizerConfig
from tpformer.train.step import StepOptions, train_step

SIZES: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "num_layers": 4, "max_seq_len": 64}
MODELS: dict[str, ModelConfig] = {
    "llama": llama(**SIZES, num_kv_heads=2, ffn_hidden_size=160),
    "llama-tied": llama(**SIZES, num_kv_heads=2, ffn_hidden_size=160, tie_embeddings=True),
    "gpt-tied": gpt(**SIZES),
    "gpt-untied": gpt(**SIZES, tie_embeddings=False),
}
"""Those of the table of compositions, with activations that matter, and without dropout."""
BATCH, LENGTH = 8, 64
LEAST = 1 << 14
"""Bytes of a storage that is offloaded: by default nothing of models so small would move."""


Measured = dict[str, int]
"""Bytes of a rank: parameters, gradients, optimizer, and at its peak the rest; all of it is the total.

Gradients that replicas share out are in the rest: they are made anew in each step.
"""


def candidate(model: ModelConfig, parallel: ParallelConfig, micro_batch_size: int) -> Candidate:
    """A step of a few tokens on CPUs."""
    return Candidate(model, parallel, LENGTH, BATCH, micro_batch_size, on_cpu=True)


def measure(case: Candidate) -> Measured:
    """On a rank: of three steps after the first the one that takes least.

    Under load a thread of gloo's may let go of a tensor late, which only adds.
    """
    before = set(_alive())
    with double(torch.float32):
        mesh = Mesh.of(case.parallel, "cpu")
        built = _build(case, mesh)
        samples = torch.randint(case.model.vocab_size, (case.batch_size // case.dp, case.seq_len + 1))
        options = StepOptions(micro_batch_size=case.micro_batch_size, lr=0.01, key=Key(5))
        step = partial(train_step, built.runner, built.gradients, built.optimizer, samples, options)
        step()
        held, peak = min(
            (_measured(step, built, before) for _ in range(3)), key=lambda found: found[0] + found[1].bytes
        )
    state = () if case.parallel.offload_optimizer else built.optimizer.state().values()
    report = memory_report(peak, built.model.parameters(), built.gradients.buffers(), state)
    lasting = {name: getattr(report, name) for name in ("parameters", "gradients", "optimizer")}
    total = held - sum(_host_state(case, built)) + report.activations
    return lasting | {"the rest": total - sum(lasting.values()), "the total": total}


def _measured(step: Callable[[], object], built: Training, before: set[int]) -> tuple[int, MemoryPeak]:
    """Bytes that lay there, and what a step made at its peak."""
    there = [weakref.ref(x) for name, x in _alive().items() if name not in before]
    held = _bytes(there)
    # FSDP resizes its storages by hand, and pipelines put others in the place of receive buffers
    with measure_memory(torch.device("cpu"), elsewhere=lambda: _on_host(built) + held - _bytes(there)) as peak:
        step()
    return held, peak


def _build(case: Candidate, mesh: Mesh) -> Training:
    config: TrainConfig[Any] = TrainConfig(
        model=case.model,
        run=RunConfig(batch_size=case.batch_size, micro_batch_size=case.micro_batch_size, seed=3),
        data=DataConfig(seq_len=case.seq_len),
        parallel=case.parallel,
        optimizer=OptimizerConfig(lr=0.01, clip_norm=0.5),
    )
    built = build(config, mesh, case.model.vocab_size)
    if built.offload is not None:
        built.offload.least_bytes = LEAST
    return built


def _on_host(built: Training) -> int:
    return built.offload.host_bytes if built.offload else 0


def _host_state(case: Candidate, built: Training) -> list[int]:
    """Bytes of the optimizer's state that stand for host memory: all but weights that the model computes with."""
    if not case.parallel.offload_optimizer:
        return []
    weights = {_storage(p)._cdata for p in built.model.parameters()}
    storages = {_storage(x)._cdata: _storage(x) for x in built.optimizer.state().values()}
    return [storage.nbytes() for name, storage in storages.items() if name not in weights]


def _storage(x: Tensor) -> UntypedStorage:
    return getattr(x, "_local_tensor", x).untyped_storage()


def _bytes(storages: Any) -> int:
    return sum(storage.nbytes() for reference in storages if (storage := reference()) is not None)


def _alive() -> dict[int, UntypedStorage]:
    """The memory of every tensor of this process."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and not isinstance(x, DTensor)]
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    storages = (x.untyped_storage() for x in tensors if not isinstance(x, DTensor) and not x.is_meta)
    return {storage._cdata: storage for storage in storages}
