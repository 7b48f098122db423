"""Time our matmul kernel beside torch's matmul: 8192³, the shards of Llama-3 on 1 to 8 ranks, and fused epilogues.

    python -m benchmarks.matmul [--models llama3-8b] [--quick] [--device cpu]

Both take turns in one process, in the layouts that a model multiplies in, and are only timed if their results agree.
What follows a matmul (bias, residual, activation, the sum in fp32) is one kernel with ours; with torch it is cuBLAS's
own where that has it, and else our op for it alone. The kernel runs in the tile of the committed table, whatever
`auto` would take. On a CPU (--device cpu, with TRITON_INTERPRET=1) tiny matrices show that the script works.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import harness
from benchmarks.device_timing import Work, interleave, own_stream, stopwatch, summary
from benchmarks.kernel_measure import first_line
from benchmarks.kernels import RESULTS, environment
from benchmarks.matmul_contenders import by_kernel, by_torch, check, operands
from benchmarks.matmul_shapes import MODELS, Shape, shapes
from tpformer_kernels.jit import INTERPRETED
from tpformer_kernels.matmul_choice import choose

KERNEL, TORCH = "kernel", "torch"
SQUARES = tuple(Shape(f"{layout} plain", 8192, 8192, 8192) for layout in ("nt", "nn", "tn"))
TINY = tuple(Shape(f"nt {epilogue}", 16, 32, 16) for epilogue in ("plain", "bias", "residual", "gelu", "gated"))
TINY += (Shape("nn plain", 16, 32, 16), Shape("tn accumulate", 16, 32, 16))
TOKENS = 8192

Row = dict[str, Any]


def measured(shape: Shape, device: torch.device, rounds: int) -> Row:
    """One shape's row: the median time of both, and torch's over ours; or the first line of an error."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    choice = choose(*shape, dtype, device)
    row: Row = {**shape._asdict(), "dtype": str(dtype).removeprefix("torch."), "tile": choice.tile}
    try:
        x = operands(shape, dtype, device)
        check(shape, x)
        runs = {KERNEL: by_kernel(shape, x), TORCH: by_torch(shape, x)}
        watches = {name: stopwatch(Work((run,)), device) for name, run in runs.items()}
        timings = {name: summary(samples) for name, samples in interleave(watches, rounds).items()}
    except Exception as error:  # the other shapes go on
        return row | {"error": first_line(error)}
    finally:
        harness.release_memory(device)
    flops = 2 * shape.m * shape.n * shape.k
    rates = {f"{name}_tflops": flops / timing["median_ms"] / 1e9 for name, timing in timings.items()}
    return row | timings | rates | {"ratio": timings[TORCH]["median_ms"] / timings[KERNEL]["median_ms"]}


def bars(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What is promised of the kernel's speed over torch's, and what it came to; None where nothing was measured."""
    timed = [row for row in rows if "error" not in row]
    squares = [row["ratio"] for row in timed if row["m"] == row["n"] == row["k"]]
    plain = [row["ratio"] for row in timed if row["kind"].endswith("plain") and not row["m"] == row["n"] == row["k"]]
    gelu, gated = ([row["ratio"] for row in timed if row["kind"].endswith(name)] for name in ("gelu", "gated"))
    wanted = [
        ("8192³, each", 0.95, squares),
        ("shards, each", 0.90, plain),
        ("bias and GELU, each", 1.00, gelu),
        ("SwiGLU, each", 1.00, gated),
    ]
    return [
        {
            "target": name,
            "bound": bound,
            "measured": min(found, default=None),
            "met": min(found) >= bound if found else None,
        }
        for name, bound, found in wanted
    ]


def lines(row: Row) -> Iterator[str]:
    """A row for the terminal."""
    place = f"{row['kind']:15}{row['m']:>7} x {row['n']:>6} x {row['k']:>6}  {row['tile']:12}"
    if "error" in row:
        yield f"{place}{row['error']}"[:120]
    else:
        times = "".join(f"{row[name]['median_ms']:10.4f} ms {row[f'{name}_tflops']:7.1f}" for name in (KERNEL, TORCH))
        yield f"{place}{times}  x {row['ratio']:.3f}"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags; exits with a message for a device that is not there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matmul", description=(__doc__ or "").split("\n")[0])
    names = [model.name for model in MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=names[:2], metavar="MODEL", help=", ".join(names))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="8192³ only")
    parser.add_argument("--rounds", type=int, default=11, help="samples of each (default 11)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the record")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu interprets the kernels at tiny sizes")
    if options.device == "cpu" and not INTERPRETED:
        parser.error("--device cpu needs TRITON_INTERPRET=1")
    if options.rounds < 1:
        parser.error(f"--rounds ({options.rounds}) must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every result agrees with torch's."""
    options = parsed(arguments)
    device = torch.device("cpu")
    chosen: tuple[Shape, ...] = TINY
    if options.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        models = [model for model in MODELS if model.name in options.models]
        chosen = SQUARES if options.quick else (*SQUARES, *shapes(models, [TOKENS]))
    where = environment("benchmarks.matmul", device)
    name = "cpu" if options.device == "cpu" else re.sub(r"[^a-z0-9]+", "_", where["device"].lower()).strip("_")
    path = options.output / f"matmul_{name}{'_quick' if options.quick else ''}.json"
    rows: list[Row] = []
    with own_stream(device):
        for shape in tqdm(chosen, disable=None):
            rows.append(measured(shape, device, options.rounds))
            print(*lines(rows[-1]), sep="\n", flush=True)
            record = {"schema_version": 1, "benchmark": "matmul", "environment": where, "rows": rows}
            harness.write_json(path, record | {"targets": bars(rows if options.device == "cuda" else [])})
    for bar in bars(rows if options.device == "cuda" else []):
        result = "not measured" if bar["met"] is None else f"{bar['measured']:.3f} {'met' if bar['met'] else 'missed'}"
        print(f"{bar['target']:26} >= {bar['bound']:.2f} x as fast as torch: {result}")
    print(f"written to {path}")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
