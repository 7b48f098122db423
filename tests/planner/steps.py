"""One training step of any layout on its ranks, traced; and the candidate that the planner is asked about."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from tests.proofs.compositions import BATCH, LENGTH, MODELS, VOCABULARY, Composition, double
from tpformer import Key, Mesh, ParallelConfig
from tpformer.layers import linear_cross_entropy
from tpformer.parallel.compile import compile_blocks
from tpformer.parallel.data import GradientBuckets
from tpformer.planner import dp_traffic
from tpformer.planner.candidate import Candidate
from tpformer.planner.traffic import Traffic
from tpformer.trace import trace_communication
from tpformer.train import build as building
from tpformer.train.config import DataConfig, RunConfig, TrainConfig
from tpformer.train.step import StepOptions, train_step

Kind = tuple[str, str, int, str, str]
"""op, axis, bytes, dtype and phase; of what stages hand over no phase, which only autograd's work has."""


@dataclass(frozen=True)
class Case:
    """A model on a layout; small buckets and chunks, if given, make several of a tiny model's."""

    model: Any
    parallel: ParallelConfig
    micro_batch_size: int = 2
    bucket_bytes: int = 0
    chunk_bytes: int = 0

    @staticmethod
    def of(row: Composition) -> "Case":
        """A row of the composition table."""
        return Case(replace(MODELS[row.model], vocab_size=VOCABULARY), row.parallel, row.micro_batch_size)

    @property
    def candidate(self) -> Candidate:
        """What the planner is asked."""
        parallel = replace(self.parallel, dp=self.parallel.dp or 1)
        return Candidate(self.model, parallel, LENGTH, BATCH, self.micro_batch_size, on_cpu=True)

    @contextmanager
    def small(self) -> Iterator[None]:
        """The thresholds, of the library and of the planner."""
        with ExitStack() as stack:
            if self.bucket_bytes:
                stack.enter_context(patch.object(dp_traffic, "BUCKET_BYTES", self.bucket_bytes))
                buckets = partial(GradientBuckets, bucket_bytes=self.bucket_bytes)
                stack.enter_context(patch.object(building, "GradientBuckets", buckets))
            if self.chunk_bytes:
                stack.enter_context(patch.object(linear_cross_entropy, "LEAST_CHUNK", self.chunk_bytes))
            # of inductor's passes none adds or drops a collective, and they take half a minute
            quick = partial(compile_blocks, backend="aot_eager")
            stack.enter_context(patch.object(building, "compile_blocks", quick))
            yield


def traced(case: Case) -> tuple[int, int, Counter[Kind]]:
    """On a rank: its place on pp and dp, and the collectives of the second step."""
    with double(torch.float32), case.small():
        mesh = Mesh.of(case.parallel, "cpu")
        run = RunConfig(batch_size=BATCH, micro_batch_size=case.micro_batch_size)
        config = TrainConfig(model=case.model, run=run, data=DataConfig(seq_len=LENGTH), parallel=case.parallel)
        built = building.build(config, mesh, case.model.vocab_size)
        samples = torch.randint(case.model.vocab_size, (BATCH // mesh.dp.size, LENGTH + 1))
        key = None if case.parallel.compile else Key(5)  # a compiled dropout takes long
        for _ in range(2 if mesh.pp.size > 1 else 1):  # a pipeline's first step has more: torch's stages meet
            with trace_communication() as trace:
                options = StepOptions(micro_batch_size=case.micro_batch_size, lr=0.01, key=key)
                train_step(built.runner, built.gradients, built.optimizer, samples, options)
        found: Counter[Kind] = Counter()
        for call in trace.calls:
            phase = "" if call.op in ("send", "recv") else call.phase
            found[call.op, call.axis, call.bytes, call.dtype, phase] += 1
        return mesh.pp.rank, mesh.dp.rank, found


def counted(predicted: tuple[Traffic, ...]) -> Counter[Kind]:
    """The planner's, as the trace counts."""
    found: Counter[Kind] = Counter()
    for each in predicted:
        phase = "" if each.op in ("send", "recv") else each.phase
        found[each.op, each.axis, each.bytes, each.dtype, phase] += each.calls
    return found
