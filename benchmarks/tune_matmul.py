"""Find each known matmul's best tile on this GPU, and how it compares with torch's; `auto` chooses by that.

    python -m benchmarks.tune_matmul [--models llama3-8b] [--tokens 8192] [--write]
    python -m benchmarks.tune_matmul --derive

For each row of the table every tile is checked against torch's result, then timed; the best two are timed once more in
turn with torch (and its separate epilogue), and the row keeps the winner and its speedup over torch. Without --write
the rows are only printed. --derive needs no GPU: it gives every table its rows, unmeasured ones as they follow from the
number of tiles; rows that are measured stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks import harness
from benchmarks.device_timing import Stopwatch, Work, interleave, own_stream, stopwatch
from benchmarks.kernel_measure import first_line
from benchmarks.kernels import environment
from benchmarks.matmul_contenders import Operands, by_kernel, by_torch, check, launched_in, operands
from benchmarks.matmul_shapes import MODELS, TOKENS, Shape, shapes
from benchmarks.tune_device import require_device, write_whole
from tpformer_kernels import matmul_choice, tables

FINALISTS = 2
ROUNDS = 11
TORCH = "torch"
TABLES = Path(tables.__file__).parent / "tables"

Tiles = dict[str, dict[str, int]]
Row = dict[str, Any]
Race = Callable[[Shape, Tiles], tuple[dict[str, float], list[str]]]
"""Seconds of torch and of the tiles that came to the final, and what failed."""


class Verdict(NamedTuple):
    """What came of one row."""

    key: str
    row: Row | None
    """None where nothing could be timed."""
    failures: list[str]


def row_of(tile: str, speedup: float | None) -> Row:
    return {"tile": tile, "speedup": speedup}


def tiles_of(architecture: int) -> Tiles:
    """The candidates for bf16, read in the best way of the architecture."""
    loads = matmul_choice.best_loads(architecture, "half")
    return matmul_choice.table(architecture)["tiles"][f"half {loads}"]


def derived(architecture: int) -> dict[str, Any]:
    """The architecture's table with a row for each shape: as measured, or by the number of tiles."""
    table = matmul_choice.table(architecture)
    tiles, multiprocessors = tiles_of(architecture), matmul_choice.MULTIPROCESSORS[architecture]
    rows = {}
    for kind, m, n, k in shapes():
        key = matmul_choice.key_of(kind, m, n, k)
        before = table["shapes"].get(key)
        measured = before is not None and before["speedup"] is not None
        rows[key] = before if measured else row_of(matmul_choice.derived_tile(tiles, m, n, multiprocessors), None)
    return table | {"shapes": rows}


def prepared(shape: Shape, x: Operands, tile: str, options: dict[str, int], device: torch.device) -> Stopwatch:
    """The kernel in one tile, checked and warmed up."""
    with launched_in(tile, options):
        check(shape, x)
        watch = stopwatch(Work((by_kernel(shape, x),)), device)

    def sample() -> float:
        with launched_in(tile, options):
            return watch.sample()

    return Stopwatch(sample, watch.how)


def race_on(device: torch.device, shape: Shape, tiles: Tiles) -> tuple[dict[str, float], list[str]]:
    """Time every tile alone, then the fastest few in turn with torch."""
    x = operands(shape, torch.bfloat16, device)
    watches: dict[str, Stopwatch] = {}
    glances: dict[str, float] = {}
    failures = []
    for tile, options in tiles.items():
        try:
            watches[tile] = prepared(shape, x, tile, options, device)
            glances[tile] = statistics.median(watches[tile].sample() for _ in range(3))
        except Exception as error:  # too much shared memory, or a wrong result: the others go on
            failures.append(f"{tile}: {first_line(error)}")
    finalists = {tile: watches[tile] for tile in sorted(glances, key=lambda tile: glances[tile])[:FINALISTS]}
    theirs = stopwatch(Work((by_torch(shape, x),)), device)
    samples = interleave({TORCH: theirs, **finalists}, ROUNDS)
    del watches, finalists, theirs  # their graphs hold memory
    harness.release_memory(device)
    return {name: statistics.median(values) for name, values in samples.items()}, failures


def judge(shape: Shape, tiles: Tiles, race: Race) -> Verdict:
    """One row: the fastest tile, and torch's time over its own."""
    key = matmul_choice.key_of(*shape)
    try:
        seconds, failures = race(shape, tiles)
    except Exception as error:  # not enough memory, say
        return Verdict(key, None, [first_line(error)])
    ours = {tile: value for tile, value in seconds.items() if tile != TORCH}
    if not ours:
        return Verdict(key, None, failures)
    best = min(ours, key=lambda tile: ours[tile])
    return Verdict(key, row_of(best, round(seconds[TORCH] / ours[best], 3)), failures)


def updated(table: dict[str, Any], verdicts: Sequence[Verdict], measured: dict[str, Any]) -> dict[str, Any]:
    """The table with the new rows in it. Rows that another device or version measured are unmeasured again."""
    before = table["measured"] or {}
    same = all(before.get(name) == measured.get(name) for name in ("device", "torch", "triton"))
    kept = {key: row if same else row_of(row["tile"], None) for key, row in table["shapes"].items()}
    found = {verdict.key: verdict.row for verdict in verdicts if verdict.row is not None}
    return table | {"measured": measured, "shapes": kept | found}


def rendered(table: dict[str, Any]) -> str:
    """The table as its file has it: a tile or a row a line."""
    head = [f' "{name}": {json.dumps(table[name])}' for name in ("architecture", "measured")]
    tiles = (f'  "{name}": ' + _lines(rows, "  ") for name, rows in table["tiles"].items())
    body = [' "tiles": {\n' + ",\n".join(tiles) + "\n }", ' "shapes": ' + _lines(table["shapes"], " ")]
    return "{\n" + ",\n".join(head + body) + "\n}\n"


def _lines(rows: dict[str, Any], indent: str) -> str:
    return "{\n" + ",\n".join(f"{indent} {json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items()) + f"\n{indent}}}"


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Its file, one row a line."""
    write_whole(path, rendered(table))


def lines(verdict: Verdict) -> Iterator[str]:
    """One row's result for the terminal."""
    if verdict.row is None:
        yield f"{verdict.key:40}  nothing could be timed"
    else:
        yield f"{verdict.key:40}  {verdict.row['tile']:12}  {verdict.row['speedup']:6.3f} x as fast as torch"
    yield from (f"    failed: {failure}" for failure in verdict.failures)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags; exits with a message where nothing can be measured or written."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune_matmul", description=(__doc__ or "").split("\n")[0]
    )
    names = [model.name for model in MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="MODEL", help=", ".join(names))
    parser.add_argument("--tokens", nargs="+", type=int, choices=TOKENS, default=list(TOKENS))
    parser.add_argument("--write", action="store_true", help="write the rows to the architecture's table")
    parser.add_argument("--derive", action="store_true", help="write every table's unmeasured rows anew, and stop")
    options = parser.parse_args(arguments)
    if options.derive:
        return options
    require_device(parser, options.write)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Race, print, and write if asked to, after each row so that an end in between loses little."""
    options = parsed(arguments)
    if options.derive:
        for architecture in tables.ARCHITECTURES:
            write_table(TABLES / f"matmul_sm_{architecture}.json", derived(architecture))
        return
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = tables.architecture_of(device)
    where = environment("benchmarks.tune_matmul", device)
    measured = {name: where[name] for name in ("device", "torch", "triton", "command", "date")}
    table, path = matmul_choice.table(architecture), TABLES / f"matmul_sm_{architecture}.json"
    chosen = shapes([model for model in MODELS if model.name in options.models], options.tokens)
    verdicts: list[Verdict] = []
    print(f"{where['device']}, torch {where['torch']}, triton {where['triton']}: sm_{architecture}")
    with own_stream(device):
        for shape in tqdm(chosen, disable=None):
            verdicts.append(judge(shape, tiles_of(architecture), lambda *place: race_on(device, *place)))
            for line in lines(verdicts[-1]):
                print(line, flush=True)
            if options.write:
                write_table(path, updated(table, verdicts, measured))
    print(f"written to {path}" if options.write else "nothing is written without --write")


if __name__ == "__main__":
    main()
