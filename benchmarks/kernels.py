"""Time each kernel beside plain torch, torch.compile and Liger, and against what the device can do at most.

    python -m benchmarks.kernels [--ops rms_norm cross_entropy] [--quick] [--device cpu]

Every provider is first checked against plain torch in fp32; one that computes something else is not timed. Forward
is timed as in training, with gradients wanted; backward alone, through a kept graph; and both. In-place cross entropy
and linear + cross entropy, whose backward runs once or in forward, are timed as a whole. Contenders take turns in one
process with the ceiling (a large copy, or torch.mm), inputs rotate where the L2 cache would hold them, and short
kernels are replayed from CUDA graphs, so that gaps between launches do not count.

On a CPU (--device cpu) the references in plain torch run at tiny sizes: that shows the script works, nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import harness, kernel_report
from benchmarks.device_timing import own_stream
from benchmarks.kernel_cases import BUILDERS, Case, cases
from benchmarks.kernel_measure import Ceiling, Row, copy_ceiling, first_line, matmul_ceiling, measure
from benchmarks.kernel_providers import COMPILED, NAMES, OURS
from tpformer_kernels import tables

RESULTS = Path(__file__).parent / "results"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags; exits with a message for a device that is not there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ops", nargs="+", choices=BUILDERS, default=list(BUILDERS), help="default: all", metavar="OP")
    parser.add_argument("--providers", nargs="+", choices=NAMES, default=None, metavar="PROVIDER")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="the main sizes only, five rounds")
    parser.add_argument("--rounds", type=int, default=None, help="samples of each contender (default 10)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the record and the plots")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu runs the references at tiny sizes")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds ({options.rounds}) must be at least 1")
    options.rounds = options.rounds or (5 if options.quick else 10)
    # compiling takes minutes on a CPU and shows nothing there
    options.providers = options.providers or [n for n in NAMES if options.device == "cuda" or n != COMPILED]
    return options


def environment(module: str, device: torch.device) -> dict[str, Any]:
    """Where and how the numbers came about."""
    found: dict[str, Any] = {"device": harness.cpu_model()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_cache_bytes": properties.L2_cache_size,
            "driver": driver_version(),
            "table": f"sm_{tables.architecture_of(device)}",
        }
    return found | {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
        "liger_kernel": installed("liger_kernel"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "variables": harness.tuning_variables(),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": harness.git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def driver_version() -> str | None:
    """The GPU driver's version, if its tool is there to ask."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


def installed(package: str) -> str | None:
    """A package's version; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure_case(case: Case, ceiling: Ceiling, options: argparse.Namespace, device: torch.device) -> list[Row]:
    """One case's rows; of a case that cannot be set up, one with the error."""
    try:
        return measure(case, options.providers, ceiling, device, options.rounds)
    except Exception as error:
        place = {"op": case.op, "size": case.size.label, "main": case.size.main, "shape": case.shape}
        dtype = str(case.dtype).removeprefix("torch.")
        return [place | {"dtype": dtype, "provider": OURS, "direction": None, "error": first_line(error)}]
    finally:
        if COMPILED in options.providers:
            torch.compiler.reset()  # what was compiled for other shapes counts against torch's limit
        harness.release_memory(device)


def ceiling_medians(rows: list[Row]) -> dict[str, float | None]:
    """The medians of what was measured beside the rows."""
    kinds = {"copy_gb_per_s": "gb_per_s", "mm_tflops": "tflops"}
    found = {name: [row["ceiling"] for row in rows if unit in row] for name, unit in kinds.items()}
    return {name: statistics.median(values) if values else None for name, values in found.items()}


def record_of(rows: list[Row], where: dict[str, Any], on_cuda: bool) -> dict[str, Any]:
    """The whole result."""
    return {
        "schema_version": 1,
        "benchmark": "kernels",
        "environment": where,
        "ceilings": ceiling_medians(rows),
        "targets": kernel_report.judge(rows, on_cuda),
        "rows": rows,
    }


def file_stem(where: dict[str, Any], options: argparse.Namespace) -> str:
    """kernels_<device>, and what was left out, so that a part does not replace the whole."""
    device = "cpu" if options.device == "cpu" else re.sub(r"[^a-z0-9]+", "_", where["device"].lower()).strip("_")
    parts = [] if set(options.ops) == set(BUILDERS) else options.ops
    return "_".join(["kernels", device, *parts, *(["quick"] if options.quick else [])])


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every op, writing the record and the op's plot after each, so that an end in between loses little."""
    device = (
        torch.device(options.device, torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    )
    where = environment("benchmarks.kernels", device)
    rows: list[Row] = []
    stem = file_stem(where, options)
    record = record_of(rows, where, device.type == "cuda")
    with own_stream(device):
        ceilings = {False: copy_ceiling(device), True: matmul_ceiling(device)}
        for op in tqdm(options.ops, disable=None):
            mine = [
                row
                for case in cases(op, device, options.quick)
                for row in measure_case(case, ceilings[case.flops > 0], options, device)
            ]
            rows = [*rows, *mine]
            record = record_of(rows, where, device.type == "cuda")
            harness.write_json(options.output / f"{stem}.json", record)
            kernel_report.plot(op, mine, where["device"], options.output / f"{stem}_{op}.png")
    print(f"{where['device']}, torch {where['torch']}, triton {where['triton']}, liger {where['liger_kernel']}")
    for line in (*kernel_report.table(rows), "", *kernel_report.verdicts(record["targets"])):
        print(line)
    print(f"\nwritten to {options.output / stem}.json, and a .png for each op")
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all of tpformer's own ops agree with their references and run."""
    record = run(parsed(arguments))
    return int(any("error" in row for row in record["rows"] if row["provider"] == OURS))


if __name__ == "__main__":
    sys.exit(main())
