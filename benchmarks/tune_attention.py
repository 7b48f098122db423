"""Compare our attention with torch's own on this GPU, for the heads that a rank of known models has; `auto` goes by it.

    python -m benchmarks.tune_attention [--write]
    python -m benchmarks.tune_attention --derive

Each row of the table is a head_dim, a rank's heads and KV heads, and a length: causal, forward and backward together.
Both are checked, ours 50 times for the same bits, then timed in turn; the row keeps how many times as fast as torch's
ours was. Without --write the rows are only printed. --derive needs no GPU: it gives every table its unmeasured rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import harness
from benchmarks.device_timing import interleave, own_stream, stopwatch
from benchmarks.kernel_cases import Size, attention_case
from benchmarks.kernel_measure import Contender, first_line
from benchmarks.kernel_providers import EAGER, OURS
from benchmarks.kernels import environment
from benchmarks.matmul_shapes import MODELS, TENSOR_PARALLEL
from benchmarks.tune_device import require_device, write_whole
from tpformer_kernels import tables
from tpformer_kernels.attention_choice import Heads, measurements

LENGTHS = (2048, 4096, 8192, 16384)
ROUNDS = 11
TABLES = Path(tables.__file__).parent / "tables"

Race = Callable[[Heads], float | str]
"""How many times as fast as torch's ours is; or why it is not known."""


def shapes() -> Iterator[Heads]:
    """What the ranks of the known models attend with, each once."""
    found = {
        Heads(model.head_dim, model.heads // tp, max(1, model.kv_heads // tp), length)
        for model in MODELS
        for tp in TENSOR_PARALLEL
        if model.heads % tp == 0
        for length in LENGTHS
    }
    yield from sorted(found)


def race_on(device: torch.device, shape: Heads) -> float | str:
    """Check both, then time them in turn, forward and backward together."""
    size = Size("", shape.up_to, 0, 0, shape.heads, shape.kv_heads, shape.head_dim)
    case = attention_case("attention", size, torch.bfloat16)
    try:
        contenders = {p.name: Contender(case, p, device) for p in case.providers if p.name in (OURS, EAGER)}
        for contender in contenders.values():
            contender.check()
        contenders[OURS].check_repeats()
        watches = {name: stopwatch(contender.work("both"), device) for name, contender in contenders.items()}
        medians = {name: statistics.median(samples) for name, samples in interleave(watches, ROUNDS).items()}
    except Exception as error:  # not enough memory, or a wrong result: the others go on
        return first_line(error)
    finally:
        harness.release_memory(device)
    return round(medians[EAGER] / medians[OURS], 3)


def updated(table: dict[str, Any], found: dict[Heads, float], measured: dict[str, Any] | None) -> dict[str, Any]:
    """The table with a row for each shape, and what was found; what another device measured is unmeasured again."""
    before = table["measured"] or {}
    same = measured is None or all(before.get(name) == measured.get(name) for name in ("device", "torch", "triton"))
    rows = {name: table["speedups"].get(name) if same else None for name in map(str, shapes())}
    return table | {
        "measured": table["measured"] if measured is None else measured,
        "speedups": rows | {str(shape): speedup for shape, speedup in found.items()},
    }


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Its file, one row a line."""
    write_whole(path, json.dumps(table, indent=1) + "\n")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags; exits with a message where nothing can be measured or written."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune_attention", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--write", action="store_true", help="write the rows to the architecture's table")
    parser.add_argument("--derive", action="store_true", help="give every table its unmeasured rows, and stop")
    options = parser.parse_args(arguments)
    if options.derive:
        return options
    require_device(parser, options.write)
    return options


def compared(race: Race, found: dict[Heads, float]) -> Iterator[None]:
    """Race every shape, print what came of it and keep it in `found`; pauses after each."""
    for shape in tqdm(list(shapes()), disable=None):
        result = race(shape)
        if isinstance(result, str):
            print(f"{shape!s:20}  failed: {result}", flush=True)
        else:
            found[shape] = result
            print(f"{shape!s:20}  {result:6.3f} x as fast as torch's own", flush=True)
        yield


def main(arguments: Sequence[str] | None = None) -> None:
    """Race, print, and write if asked to, after each row so that an end in between loses little."""
    options = parsed(arguments)
    if options.derive:
        for architecture in tables.ARCHITECTURES:
            table = updated(measurements(architecture), {}, None)
            write_table(TABLES / f"attention_sm_{architecture}.json", table)
        return
    device = torch.device("cuda", torch.cuda.current_device())
    architecture, where = tables.architecture_of(device), environment("benchmarks.tune_attention", device)
    measured = {name: where[name] for name in ("device", "torch", "triton", "command", "date")}
    table, path = measurements(architecture), TABLES / f"attention_sm_{architecture}.json"
    found: dict[Heads, float] = {}
    with own_stream(device):
        for _ in compared(lambda shape: race_on(device, shape), found):
            if options.write:
                write_table(path, updated(table, found, measured))
    print(f"written to {path}" if options.write else "nothing is written without --write")


if __name__ == "__main__":
    main()
