"""`tpformer plan`: what a model will take on so many devices, and the best layouts for it."""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from tpformer.checkpoint.huggingface import read_config
from tpformer.parallel_config import Precision
from tpformer.planner.candidate import ModelConfig
from tpformer.planner.cost import Machine
from tpformer.planner.hardware import device, hardware_table, link
from tpformer.planner.known_models import known_model
from tpformer.planner.picture import plot
from tpformer.planner.report import explain, table
from tpformer.planner.search import Plan, Search, run


def add_command(commands: Any) -> None:
    """The flags of `tpformer plan`."""
    summary = "predict memory, traffic and step time of every layout of a model, and print the best"
    parser = commands.add_parser("plan", help=summary, description=summary)
    parser.add_argument("--model", default="llama-8b", help="a known name, or a Hugging Face directory")
    parser.add_argument("--gpus", type=int, default=8, help="devices in all")
    parser.add_argument("--device", default="h100-sxm", help="of --list-hardware, or a file of `tpformer calibrate`")
    parser.add_argument("--network", default="ib-400", help="between nodes")
    parser.add_argument("--tokens-per-step", type=count, default="1M", help="over all devices; K is 1024, M is K x K")
    parser.add_argument("--seq", type=count, default="8K", help="tokens of a sample")
    parser.add_argument("--precision", choices=get_args(Precision), default="bf16")
    parser.add_argument("--best", type=int, default=10, metavar="N", help="layouts to print")
    parser.add_argument("--explain", type=int, nargs="?", const=1, metavar="N", help="the N-th layout's formulas")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="bars of memory and time, and the pipeline")
    parser.add_argument("--list-hardware", action="store_true", help="every device and network with its sources")
    parser.set_defaults(run=run_plan)


def count(text: str) -> int:
    """4M and 8K as numbers. Raises argparse's error for what is no count."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in units else (text, "")
    try:
        return int(float(number) * units.get(unit, 1))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number such as 4096, 8K or 4M") from None


def run_plan(options: argparse.Namespace) -> int:
    """Print what was asked for; 1 if it cannot be, otherwise 0."""
    if options.list_hardware:
        print(hardware_table())
        return 0
    try:
        show(options, run(search_of(options)))
    except (ValueError, OSError) as error:
        print(f"tpformer plan: {error}", file=sys.stderr)
        return 1
    return 0


def search_of(options: argparse.Namespace) -> Search:
    """What the flags ask for. Raises ValueError for unknown names and for numbers below 1."""
    for name in ("gpus", "tokens_per_step", "seq", "best"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} ({getattr(options, name)}) must be at least 1")
    model = model_of(options.model)
    machine = Machine(device(options.device), link(options.network))
    length = min(options.seq, model.max_seq_len)
    return Search(model, options.gpus, machine, options.tokens_per_step, length, options.precision)


def model_of(name: str) -> ModelConfig:
    """A model by its known name, or of a Hugging Face directory's config.json."""
    if Path(name).is_dir():
        found: ModelConfig = read_config(Path(name))[1]
        return found
    return known_model(name)


def show(options: argparse.Namespace, plans: list[Plan]) -> None:
    """The table, or one plan's formulas; and the picture. Raises ValueError for a layout that there is not."""
    best = plans[: options.best]
    if options.explain is not None:
        if not 1 <= options.explain <= len(plans):
            raise ValueError(f"--explain ({options.explain}) must be 1 to {len(plans)}, the layouts that fit")
        print(explain(plans[options.explain - 1]))
    else:
        print(table(best))
        print(f"\n{len(plans)} layouts fit; --explain N shows the formulas of the N-th")
    if options.plot:
        plot(options.plot, best)
        print(f"{options.plot} has bars of memory and of time")
