"""Find the launch options of the kernels on this GPU, and write them to the table of its architecture.

    python -m benchmarks.tune [--kernels rope norm_forward] [--write]

For each row of the committed table every candidate runs through the real op: it is checked against plain torch, run
50 times for the same bits, then timed; the best are timed once more in turn with the committed options, and only one
that is more than 2% faster takes their place. Without --write the winners are only printed. The table is what ships:
nothing is tuned at run time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

from benchmarks import harness
from benchmarks.device_timing import Stopwatch, interleave, own_stream, stopwatch
from benchmarks.kernel_cases import Case
from benchmarks.kernel_measure import Contender, first_line
from benchmarks.kernels import environment
from benchmarks.tune_cases import TUNED, Options, candidates, work_of
from benchmarks.tune_device import require_device, write_whole
from tpformer_kernels import tables

MARGIN = 1.02  # how much faster than the committed options the winner must be: less is noise
FINALISTS = 3
ROUNDS = 11
TABLES = Path(tables.__file__).parent / "tables"

Race = Callable[[str, int, list[Options]], list[float | str]]
"""Seconds of each candidate for rows of a size, the first being the committed one; or why it has none."""


@dataclass(frozen=True)
class Verdict:
    """What came of one row of a table."""

    key: str
    up_to: int | None
    size: int
    committed: Options
    best: Options
    margin: float | None
    """How many times faster than the committed options the best were; None if nothing could be timed."""
    failures: tuple[str, ...]

    @property
    def replaces(self) -> bool:
        """Whether the best take the committed options' place."""
        return self.margin is not None and self.margin > MARGIN

    @property
    def row(self) -> dict[str, int | None]:
        """The row of the table from now on."""
        return {"up_to": self.up_to, **(self.best if self.replaces else self.committed)}


@contextlib.contextmanager
def launched_with(key: str, options: Options, device: torch.device) -> Iterator[None]:
    """Every launch that asks the tables for `key` gets these options."""
    committed = tables.table(tables.architecture_of(device))
    row = {"up_to": None, **options}
    changed = committed | {"kernels": committed["kernels"] | {key: [row]}}
    with patch.object(tables, "table", lambda architecture: changed):
        if tables.options(key, 1, device) != options:
            raise RuntimeError("the tables no longer ask tables.table for their rows: nothing would be tuned")
        yield


def prepared(case: Case, key: str, options: Options, device: torch.device) -> Stopwatch:
    """The op with one candidate, checked and warmed up."""
    with launched_with(key, options, device):
        contender = Contender(case, case.providers[0], device)
        contender.check()
        contender.check_repeats()
        watch = stopwatch(contender.work(TUNED[key].direction), device)

    def sample() -> float:
        with launched_with(key, options, device):
            return watch.sample()

    return Stopwatch(sample, watch.how)


def race_on(device: torch.device, key: str, size: int, options: list[Options]) -> list[float | str]:
    """Time every candidate alone, then the fastest few in turn with the committed one, which is the first."""
    case = work_of(key, size)
    results: list[float | str] = []
    for candidate in tqdm(options, desc=f"{key} {size}", leave=False, disable=None):
        try:
            watch = prepared(case, key, candidate, device)
            results.append(statistics.median(watch.sample() for _ in range(3)))
        except Exception as error:  # too much shared memory, or a wrong result: the others go on
            results.append(first_line(error))
        watch = None  # type: ignore[assignment]  # its graph holds memory
        harness.release_memory(device)
    finalists = [index for index in ranked(results) if index][:FINALISTS]
    if isinstance(results[0], str) or not finalists:
        return results
    watches = {str(index): prepared(case, key, options[index], device) for index in [0, *finalists]}
    for index, samples in interleave(watches, ROUNDS).items():
        results[int(index)] = statistics.median(samples)
    # who did not reach the final has lost, whatever a single glance at it said
    final = {0, *finalists}
    return [result if i in final or isinstance(result, str) else float("inf") for i, result in enumerate(results)]


def ranked(results: Sequence[float | str]) -> list[int]:
    """The candidates that were timed, the fastest first."""
    timed = [(result, index) for index, result in enumerate(results) if not isinstance(result, str)]
    return [index for _, index in sorted(timed)]


def sizes_of(key: str, rows: list[dict[str, Any]]) -> list[int]:
    """The size that stands for each row: its largest, and for the last one that models have."""
    sizes = [TUNED[key].last if row["up_to"] is None else row["up_to"] for row in rows]
    lower = [0, *(row["up_to"] for row in rows[:-1])]
    if any(size <= below for size, below in zip(sizes, lower, strict=True)):
        raise ValueError(f"{key}: the rows must ascend, and the last be for a size below {TUNED[key].last}")
    return sizes


def tune(key: str, rows: list[dict[str, Any]], multiprocessors: int, race: Race) -> list[Verdict]:
    """One key of a table, row by row."""
    verdicts = []
    for row, size in zip(rows, sizes_of(key, rows), strict=True):
        committed = {name: value for name, value in row.items() if name != "up_to"}
        options = list(candidates(key, size, committed, multiprocessors))
        results = race(key, size, options)
        first = results[0]
        order = ranked(results)
        best = order[0] if order else 0
        margin = None
        if order:  # committed options that cannot run lose to any that can
            fastest = results[best]
            assert not isinstance(fastest, str)
            margin = float("inf") if isinstance(first, str) else first / fastest
        failures = tuple(f"{o}: {r}" for o, r in zip(options, results, strict=True) if isinstance(r, str))
        verdicts.append(Verdict(key, row["up_to"], size, committed, options[best], margin, failures))
    return verdicts


def updated(table: dict[str, Any], verdicts: Sequence[Verdict], measured: dict[str, Any]) -> dict[str, Any]:
    """The table with the winners in it, and a note of where each of its kernels was measured last."""
    kernels = dict(table["kernels"])
    for key in dict.fromkeys(verdict.key for verdict in verdicts):
        rows = [verdict.row for verdict in verdicts if verdict.key == key]
        kernels[key] = sorted(rows, key=lambda row: (row["up_to"] is None, row["up_to"] or 0))
    before = table["measured"] or {}
    same = all(before.get(name) == measured.get(name) for name in ("device", "torch", "triton"))
    names = {verdict.key for verdict in verdicts} | set(before.get("kernels", ()) if same else ())
    return table | {"measured": {**measured, "kernels": sorted(names)}, "kernels": kernels}


def rendered(table: dict[str, Any]) -> str:
    """The table as its file has it: one row a line."""
    blocks = (
        f'  "{key}": [\n' + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
        for key, rows in table["kernels"].items()
    )
    head = "".join(f' "{name}": {json.dumps(value)},\n' for name, value in table.items() if name != "kernels")
    return "{\n" + head + ' "kernels": {\n' + ",\n".join(blocks) + "\n }\n}\n"


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Its file, one row a line."""
    write_whole(path, rendered(table))


def lines(verdict: Verdict) -> Iterator[str]:
    """One row's result for the terminal."""
    place = f"{verdict.key:25}{'rest' if verdict.up_to is None else verdict.up_to!s:>7}"
    if verdict.margin is None:
        yield f"{place}  nothing could be timed"
    elif verdict.replaces:
        yield f"{place}  {verdict.margin:6.3f} x as fast: {verdict.committed} -> {verdict.best}"
    else:
        yield f"{place}  stays: the best is {verdict.margin:.3f} x as fast ({verdict.best})"
    yield from (f"    failed: {failure}" for failure in verdict.failures)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags; exits with a message where nothing can be measured or written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kernels", nargs="+", choices=TUNED, default=list(TUNED), metavar="KERNEL")
    parser.add_argument("--write", action="store_true", help="write the winners to the architecture's table")
    options = parser.parse_args(arguments)
    require_device(parser, options.write)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, print, and write if asked to, after each key so that an end in between loses little."""
    options = parsed(arguments)
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = tables.architecture_of(device)
    table, where = tables.table(architecture), environment("benchmarks.tune", device)
    measured = {name: where[name] for name in ("device", "torch", "triton", "command", "date")}
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    path = TABLES / f"sm_{architecture}.json"
    verdicts: list[Verdict] = []
    print(f"{where['device']}, torch {where['torch']}, triton {where['triton']}: sm_{architecture}")
    with own_stream(device):
        for key in options.kernels:
            found = tune(key, table["kernels"][key], multiprocessors, partial(race_on, device))
            for line in (line for verdict in found for line in lines(verdict)):
                print(line, flush=True)
            verdicts += found
            if options.write:
                write_table(path, updated(table, verdicts, measured))
    print(f"written to {path}" if options.write else "nothing is written without --write")


if __name__ == "__main__":
    main()
