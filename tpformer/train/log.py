"""What a run leaves behind for people: metrics as JSON lines, the loss plot, and rates."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from tpformer.planner.hardware import find_device


class MetricsFile:
    """Appends one JSON object a line; on resuming, lines after the checkpoint's step are dropped."""

    def __init__(self, path: Path, first_step: int):
        self.path = path
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= first_step]
            temporary = path.with_suffix(".partial")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            os.replace(temporary, path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All records, oldest first."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # half a line, from a killed writer


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of the device, None where it is not known (CPUs)."""
    found = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if found is None else found.flops.get("bf16")


def plot_loss(path: Path, records: list[dict[str, Any]], levels: dict[str, float]) -> None:
    """A PNG of training and held-out loss against steps, with horizontal lines at the named levels (nats)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for field, label, style in (("loss", "training", "-"), ("validation_loss", "held-out", "o-")):
        points = [(r["step"], r[field]) for r in records if field in r]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    for (name, level), color in zip(levels.items(), ("tab:gray", "tab:green"), strict=False):
        axes.axhline(level, color=color, linestyle="--", linewidth=1, label=f"{name} ({level:.2f})")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_suffix(".partial.png")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)
