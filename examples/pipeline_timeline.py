"""Three pipeline stages with one, three and nine micro-batches of the same batch: where the time goes, measured.

torchrun --nproc-per-node 3 examples/pipeline_timeline.py

It writes pipeline_timeline.png and prints each step's table. With one micro-batch it is plain layer-wise parallelism.
The three processes want a core, or a GPU, each: sharing one makes the stages slower than they are.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tpformer import LlamaConfig, Mesh, ParallelConfig
from tpformer.parallel.timeline import Span, Timeline, pipeline_window
from tpformer.train.build import build
from tpformer.train.config import DataConfig, RunConfig, TrainConfig
from tpformer.train.timeline_report import MeasuredStep, gather_spans, plot, table

BATCH, SEQ_LEN, VOCABULARY, STEPS = 9, 64, 512, 5
MODEL = LlamaConfig(hidden_size=256, num_layers=6, num_heads=4, max_seq_len=SEQ_LEN)
LAYOUT = ParallelConfig(pp=3, pp_schedule="gpipe")


def main(arguments: list[str]) -> None:
    """Measure the three, and show them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("pipeline_timeline.png"), help="the picture to write")
    parser.add_argument("--device", choices=["cpu"], help="by default GPUs where there are any")
    options = parser.parse_args(arguments)
    try:
        mesh = Mesh.of(LAYOUT, options.device)
    except ValueError as error:
        sys.exit(f"pipeline_timeline.py: error: {error}")
    steps = [measure(micro_batches, mesh) for micro_batches in (1, 3, 9)]
    if mesh.world.rank == 0:
        print("\n\n".join(table(step) for step in steps))
        plot(options.output, steps)
    mesh.close()


def measure(micro_batches: int, mesh: Mesh) -> MeasuredStep:
    """The shortest of a few steps after the first: what else the machine does makes steps longer, never shorter."""
    config = TrainConfig(
        model=MODEL,
        run=RunConfig(batch_size=BATCH, micro_batch_size=BATCH // micro_batches),
        data=DataConfig(seq_len=SEQ_LEN),
        parallel=LAYOUT,
    )
    training = build(config, mesh, VOCABULARY)
    samples = torch.randint(VOCABULARY, (BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    timeline, found = Timeline(mesh.device), []
    for _ in range(1 + STEPS):
        timeline.start(mesh.world)
        loss = training.runner.backward(samples.to(mesh.device), timeline=timeline)
        gradients = training.gradients.finish()
        with timeline.span("optimizer"):
            training.optimizer.step(gradients, 1e-3, loss)
        found.append(gather_spans(timeline.spans(), mesh))
    return MeasuredStep(LAYOUT.pp_schedule, micro_batches, min(found[1:], key=_duration))


def _duration(ranks: Sequence[Sequence[Span]]) -> float:
    """Seconds of the pipeline's part of a step."""
    start, end = pipeline_window(ranks)
    return end - start


if __name__ == "__main__":
    main(sys.argv[1:])
