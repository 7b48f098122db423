"""`tpformer doctor`: the facts as lines of name, value and judgement, and the warnings with what to do."""

import argparse
import dataclasses
import json
import platform
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from tpformer.doctor.facts import Facts, gather
from tpformer.doctor.findings import Finding, findings

WIDTH = 100


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    name: str
    value: str
    judgement: str = "ok"


def row(name: str, value: str | None, absent: str = "unknown") -> Row:
    """A line that is ok, or of what there is not."""
    return Row(name, value, "ok") if value else Row(name, absent, "none")


def gibibytes(count: int | None) -> str | None:
    return None if count is None else f"{count / 2**30:.1f} GiB"


def host(facts: Facts) -> Iterator[Row]:
    yield row("python", f"{platform.python_version()} ({platform.python_implementation()})")
    yield row("operating system", platform.platform())
    yield row("CPU", ", ".join(part for part in (facts.cpu, facts.cores) if part))
    yield row("memory", gibibytes(facts.memory))


def software(facts: Facts) -> Iterator[Row]:
    yield row("torch", f"{facts.torch}, {f'CUDA {facts.torch_cuda}' if facts.torch_cuda else 'without CUDA'}")
    yield row("torch on CPU", facts.blas)
    yield row("fp32 matmul on CPU", facts.cpu_matmul)
    backends = ["gloo"] * bool(facts.gloo) + [f"nccl {facts.nccl}"] * bool(facts.nccl)
    yield row("distributed", ", ".join(backends), "no backend")
    yield row("numpy", facts.numpy)
    how = ", interpreting: kernels run on CPU tensors, slowly" if facts.interpreted else ""
    yield row("triton", facts.triton and facts.triton + how, "not installed: the ops run in plain torch")
    for kind, tool in facts.ptxas.items():
        yield row(f"ptxas for sm_{kind}", f"{tool.version}, {tool.path}")
    without = ", without Python.h" if facts.headers is False else ""
    yield row("C compiler", facts.compiler and facts.compiler + without, "none found")


def devices(facts: Facts) -> Iterator[Row]:
    cuda = f", supports CUDA {facts.driver_cuda}" if facts.driver_cuda else ""
    yield row("driver", (facts.driver or "version unknown") + cuda if facts.driver or cuda else None, "none found")
    if not facts.gpus:
        unseen = ", ".join(f"{count} {name}" for name, count in Counter(facts.driver_gpus).items())
        yield row("GPU", None, f"torch sees none of: {unseen}" if unseen else "none found")
    for index, gpu in enumerate(facts.gpus):
        size = f"{gibibytes(gpu.memory)}, {gpu.multiprocessors} SMs"
        yield Row(f"GPU {index}", f"{gpu.name}, sm_{gpu.capability}, {size}, launch table sm_{gpu.table}")
    for kind, note in facts.tables.items():
        yield Row(f"launch table sm_{kind}", note or "not measured")
    if len(facts.gpus) > 1:
        pairs = len(facts.gpus) * (len(facts.gpus) - 1) // 2
        reached = None if facts.blocked is None else f"between {pairs - len(facts.blocked)} of {pairs} pairs of GPUs"
        yield row("P2P", reached)
        kinds = ", ".join(f"{kind} between {count}" for kind, count in Counter(facts.links).most_common())
        nvlink = f"{kinds} pairs of GPUs" if any(kind.startswith("NV") for kind in facts.links) else None
        yield row("NVLink", nvlink, f"none ({kinds} pairs of GPUs)" if kinds else "unknown")


def rows(facts: Facts, found: Sequence[Finding]) -> list[Row]:
    """The whole report; a line that a warning is about says so."""
    listed = [*host(facts), *software(facts), *devices(facts)]
    listed += [Row(name, value, "set") for name, value in facts.environment.items()]
    bad = {name for finding in found for name in finding.about}
    return [dataclasses.replace(line, judgement="warning") if line.name in bad else line for line in listed]


def folded(line: str, width: int) -> list[str]:
    """A line in as many as it needs; a path is broken only where it is wider than all."""
    return textwrap.wrap(line, width, subsequent_indent="  ", break_on_hyphens=False)


def text(listed: Sequence[Row], found: Sequence[Finding]) -> str:
    """The report for a terminal."""
    name_width = min(30, max(len(line.name) for line in listed))
    judgement_width = max(len(line.judgement) for line in listed)
    value_width = WIDTH - name_width - judgement_width - 4
    lines = []
    for line in listed:
        names, values = folded(line.name, name_width), folded(line.value, value_width)
        for name, value, judgement in zip_longest(names, values, [line.judgement], fillvalue=""):
            lines.append(f"{name:{name_width}}  {value:{value_width}}  {judgement}".rstrip())
    lines += ["", f"{len(found)} warning{'s' * (len(found) != 1)}{':' * bool(found)}"]
    for finding in found:
        lines += folded(f"- {', '.join(finding.about)}: {finding.problem}", WIDTH)
        lines += ["  " + line for line in folded(f"-> {finding.advice}", WIDTH - 2)]
    return "\n".join(lines)


def as_json(listed: Sequence[Row], found: Sequence[Finding]) -> str:
    """The same for a program."""
    return json.dumps(
        {
            "report": [dataclasses.asdict(line) for line in listed],
            "warnings": [dataclasses.asdict(finding) for finding in found],
        },
        indent=1,
    )


def run(options: argparse.Namespace) -> int:
    """Print the report; 1 if it was asked to be strict and there is a warning, otherwise 0."""
    facts = gather()
    found = findings(facts)
    shown = (as_json if options.json else text)(rows(facts, found), found)
    encoding = sys.stdout.encoding or "ascii"  # a terminal that lacks a letter gets its number
    print(shown.encode(encoding, "backslashreplace").decode(encoding))
    return int(options.strict and bool(found))


def add_command(commands: Any) -> None:
    """The subcommand's flags."""
    summary = "print what a run stands on, and warn of what is known to be bad"
    parser = commands.add_parser("doctor", help=summary, description=summary)
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if there is a warning")
    parser.set_defaults(run=run)
