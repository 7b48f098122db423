"""`tpformer plan`: what a model will take on so many devices, and the best layouts for it."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, get_args

from tpformer.checkpoint.huggingface import read_config
from tpformer.mesh import divide
from tpformer.parallel_config import ParallelConfig, Precision
from tpformer.planner.accounting import accounting
from tpformer.planner.calibrate import calibrate
from tpformer.planner.candidate import ModelConfig
from tpformer.planner.cost import Machine
from tpformer.planner.hardware import device, hardware_table, link
from tpformer.planner.known_models import known_model
from tpformer.planner.module_traffic import module_traffic
from tpformer.planner.picture import plot
from tpformer.planner.report import explain, heading, table, time_table
from tpformer.planner.search import Plan, Search, run
from tpformer.planner.step_traffic import step_traffic
from tpformer.planner.traffic_table import traffic_table
from tpformer.planner.user_module import load_module

MODULE_HELP = "instead of --model, your own: a function that returns a module and its example inputs"


def add_command(commands: Any) -> None:
    """The flags of `tpformer plan` and of `tpformer calibrate`."""
    summary = "predict memory, traffic and step time of every layout of a model, and print the best"
    parser = commands.add_parser("plan", help=summary, description=summary)
    parser.add_argument("--model", default="llama-8b", help="a known name, or a Hugging Face directory")
    parser.add_argument("--gpus", type=int, default=8, help="devices in all")
    parser.add_argument("--device", default="h100-sxm", help="of --list-hardware, or a file of `tpformer calibrate`")
    parser.add_argument("--network", default="ib-400", help="between nodes")
    parser.add_argument("--tokens-per-step", type=count, default="1M", help="over all devices; K is 1024, M is K x K")
    parser.add_argument("--seq", type=count, help="tokens of a sample; 8K, or all that the model allows")
    parser.add_argument("--precision", choices=get_args(Precision), default="bf16")
    parser.add_argument("--best", type=int, default=10, metavar="N", help="layouts to print")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--explain", type=int, nargs="?", const=1, metavar="N", help="the N-th layout's formulas")
    shown.add_argument("--traffic", type=int, nargs="?", const=1, metavar="N", help="what the N-th layout sends")
    shown.add_argument("--memory-only", action="store_true", help="bytes of model state by precision and optimizer")
    shown.add_argument("--list-hardware", action="store_true", help="every device and network with its sources")
    parser.add_argument("--module", metavar="FILE.py:FUNCTION", help=MODULE_HELP)
    parser.add_argument("--tp", type=int, default=1, help="with --module or --memory-only: ranks that share layers")
    parser.add_argument("--depth", type=int, default=1, help="with --module: down to which its children are layers")
    parser.add_argument("--batches", type=int, default=1, help="with --traffic: optimizer steps of an epoch")
    parser.add_argument("--epochs", type=int, default=1, help="with --traffic: of the whole run")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="bars of memory and time, and the pipeline")
    parser.set_defaults(run=run_plan)
    summary = "measure this CPU machine for `tpformer plan --device`"
    parser = commands.add_parser("calibrate", help=summary, description=summary)
    parser.add_argument("output", type=Path, help="a .json file")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.set_defaults(run=run_calibrate)


def count(text: str) -> int:
    """4M and 8K as numbers. Raises argparse's error for what is no count."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in units else (text, "")
    try:
        return int(float(number) * units.get(unit, 1))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number such as 4096, 8K or 4M") from None


def run_plan(options: argparse.Namespace) -> int:
    """Print what was asked for; 1 if it cannot be, otherwise 0."""
    try:
        check_flags(options)
        if options.list_hardware:
            print(hardware_table())
        elif options.memory_only:
            show_memory(options)
        elif options.module:
            show_module(options)
        else:
            show(options, run(search_of(options)))
    except (ValueError, OSError) as error:
        print(f"tpformer plan: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"tpformer plan: --plot needs {error.name}: pip install 'tpformer[train]'", file=sys.stderr)
        return 1
    return 0


def check_flags(options: argparse.Namespace) -> None:
    """Raises ValueError for numbers below 1, and for a picture of what is none."""
    for name in ("gpus", "tokens_per_step", "best", "tp", "depth", "batches", "epochs"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} ({getattr(options, name)}) must be at least 1")
    if options.plot and (options.module or options.memory_only or options.list_hardware):
        raise ValueError("--plot is of predicted layouts: leave --module, --memory-only and --list-hardware out")


def run_calibrate(options: argparse.Namespace) -> int:
    """Measure this machine and write it, whole or not at all; 1 if it cannot be, otherwise 0."""
    try:
        if options.output.suffix != ".json":
            raise ValueError(f"output ({options.output}) must end in .json, by which `tpformer plan --device` knows it")
        found = calibrate(options.seconds)
        partial = options.output.with_suffix(".partial")
        partial.write_text(found.to_json())
        os.replace(partial, options.output)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"tpformer calibrate: {error}", file=sys.stderr)
        return 1
    rates = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in found.flops.items())
    print(f"{options.output}: matmuls {rates} GFLOP/s a core; tpformer plan --device {options.output}")
    return 0


def search_of(options: argparse.Namespace) -> Search:
    """What the flags ask for. Raises ValueError for unknown names, and as Search does."""
    model = model_of(options.model)
    machine = Machine(device(options.device), link(options.network))
    length = min(8192, model.max_seq_len) if options.seq is None else options.seq
    return Search(model, options.gpus, machine, options.tokens_per_step, length, options.precision)


def model_of(name: str) -> ModelConfig:
    """A model by its known name, or of a Hugging Face directory's config.json."""
    if Path(name).is_dir():
        found: ModelConfig = read_config(Path(name))[1]
        return found
    return known_model(name)


def show(options: argparse.Namespace, plans: list[Plan]) -> None:
    """The table, one plan's formulas or its traffic; the picture. Raises ValueError for a layout that there is not."""
    asked = [number for number in (options.explain, options.traffic) if number is not None]
    best, number = plans[: options.best], (asked or [1])[0]
    if not 1 <= number <= len(plans):
        raise ValueError(f"--explain or --traffic ({number}) must be 1 to {len(plans)}, the layouts that fit")
    chosen = plans[number - 1]
    if options.explain is not None:
        print(explain(chosen))
    elif options.traffic is not None:
        print(heading(chosen) + f"\n\n{time_table([chosen])}\n")
        print(traffic_table(step_traffic(chosen.candidate), batches=options.batches, epochs=options.epochs))
    else:
        print(table(best))
        print(f"\n{len(plans)} layouts fit; --explain N shows the formulas of the N-th, --traffic N what it sends")
    if options.plot:
        plot(options.plot, best)
        print(f"{options.plot} has bars of memory and of time")


def show_memory(options: argparse.Namespace) -> None:
    """Model state of one rank, by precision and optimizer. Raises ValueError as `accounting` does."""
    shards = divide(options.gpus, options.tp, "gpus")
    model = load_module(options.module)[0] if options.module else model_of(options.model)
    print(accounting(model, ParallelConfig(tp=options.tp, dp=shards), shards=shards))


def show_module(options: argparse.Namespace) -> None:
    """What a user's module sends on that many replicas. Raises ValueError as `load_module` and `module_traffic` do."""
    module, inputs = load_module(options.module)
    if options.traffic is None:
        raise ValueError("--module goes with --traffic or --memory-only: a step's time is predicted for known models")
    layout = ParallelConfig(tp=options.tp, dp=divide(options.gpus, options.tp, "gpus"))
    found = module_traffic(module, inputs, layout, depth=options.depth)
    print(traffic_table(found, batches=options.batches, epochs=options.epochs))
