"""What is watched in the first steps of a run, one thing a step, since watching costs time."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpformer.collectives import gather_stack
from tpformer.mesh import Mesh
from tpformer.parallel.timeline import Timeline
from tpformer.trace import Trace, trace_communication
from tpformer.train.build import Training
from tpformer.train.config import TrainConfig
from tpformer.train.memory import MemoryReport, measure_memory, memory_report, memory_table, snapshot
from tpformer.train.step import StepOptions, StepReport, train_step
from tpformer.train.timeline_report import MeasuredStep, gather_spans, plot, table


class FirstSteps:
    """Steps of a run: the first one's collectives, the second one's memory and, if asked for, the third one's timeline.

    Raises ValueError for a memory snapshot of anything but CUDA.
    """

    def __init__(self, built: Training, config: TrainConfig[Any], mesh: Mesh, directory: Path):
        if config.run.memory_snapshot and mesh.device.type != "cuda":
            raise ValueError(f"memory_snapshot needs a CUDA device, not {mesh.device.type}")
        self._built, self._config, self._mesh, self._directory = built, config, mesh, directory
        self._done = 0
        self.trace: Trace | None = None
        self.memory = ""
        """A table of every rank's bytes."""
        self.timeline = ""
        """A table of every stage's working and idle time; timeline.png is its picture."""

    def step(self, samples: Tensor, options: StepOptions) -> StepReport:
        """The next step, `train.step.train_step`; collective."""
        self._done += 1
        if self._done == 1:
            with trace_communication() as self.trace:
                return self._step(samples, options)
        if self._done == 2:
            return self._measured(samples, options)
        if self._done == 3 and self._config.run.timeline:
            return self._timed(samples, options)
        return self._step(samples, options)

    def _step(self, samples: Tensor, options: StepOptions) -> StepReport:
        built = self._built
        return train_step(built.runner, built.gradients, built.optimizer, samples, options)

    def _measured(self, samples: Tensor, options: StepOptions) -> StepReport:
        built, offload, device = self._built, self._built.offload, self._mesh.device
        if self._config.parallel.compile and device.type == "cpu":
            self.memory = "not measured: on a CPU each operator would be followed, which torch.compile does not allow"
            return self._step(samples, options)
        # what is kept on the host does not count, and on a CPU it would
        state = () if self._config.parallel.offload_optimizer else built.optimizer.state().values()
        path = self._directory / f"memory_snapshot_{self._mesh.world.rank:05d}.pickle"
        with (
            snapshot(path, device) if self._config.run.memory_snapshot else nullcontext(),
            measure_memory(device, elsewhere=lambda: offload.host_bytes if offload else 0) as peak,
        ):
            report = self._step(samples, options)
        parts = memory_report(peak, built.model.parameters(), built.gradients.buffers(), state)
        made = 0 if parts.gradients else built.gradients.nbytes()  # sharded ones are made anew in each step
        numbers = [parts.parameters, parts.gradients + made, parts.optimizer, parts.activations - made]
        everyone = gather_stack(torch.tensor(numbers, device=device), self._mesh.world).tolist()
        self.memory = memory_table([MemoryReport(*rank) for rank in everyone])
        return report

    def _timed(self, samples: Tensor, options: StepOptions) -> StepReport:
        timeline, layout = Timeline(self._mesh.device), self._config.parallel
        timeline.start(self._mesh.world)
        report = self._step(samples, replace(options, timeline=timeline))
        ranks = gather_spans(timeline.spans(), self._mesh)
        count = -(-len(samples) // options.micro_batch_size)
        step = MeasuredStep(layout.pp_schedule, count, ranks, layout.stages_per_rank)
        self.timeline = table(step)
        if self._mesh.world.rank == 0:
            plot(self._directory / "timeline.png", [step])
        return report
