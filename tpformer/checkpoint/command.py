"""`tpformer checkpoint`: look into a checkpoint or a Hugging Face directory, on the CPU and without processes."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tpformer.checkpoint.convert import to_checkpoint, to_huggingface
from tpformer.checkpoint.inspect import Found, size, table, total
from tpformer.checkpoint.store import META, verify


def add_command(commands: Any) -> None:
    """The subcommands' flags."""
    summary = "look into checkpoints"
    parser = commands.add_parser("checkpoint", help=summary, description=summary)
    actions = parser.add_subparsers(required=True, metavar="action")
    summary = "print who wrote a checkpoint or a Hugging Face directory and what it holds, and verify its checksums"
    inspect = actions.add_parser("inspect", help=summary, description=summary)
    inspect.add_argument("directory", type=Path)
    inspect.add_argument("--tensors", action="store_true", help="list every tensor with its shape")
    inspect.add_argument("--no-verify", dest="verify", action="store_false", help="read the headers only")
    inspect.set_defaults(run=run_inspect)
    summary = (
        "write a checkpoint's weights as a Hugging Face directory, or such a directory as a run's first checkpoint"
    )
    convert = actions.add_parser("convert", help=summary, description=summary)
    convert.add_argument("source", type=Path, help="a checkpoint (with meta.json), or a Hugging Face directory")
    convert.add_argument("target", type=Path, help="a Hugging Face directory, or where step_00000000 is to be")
    convert.add_argument("--to", choices=["huggingface", "checkpoint"], help="by default what the source is not")
    convert.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="of a Hugging Face directory")
    convert.add_argument("--overwrite", action="store_true", help="replace a Hugging Face directory")
    convert.set_defaults(run=run_convert)


def run_inspect(options: argparse.Namespace) -> int:
    """Print what there is; 1 if anything is missing or damaged, otherwise 0."""
    try:
        found = Found.open(options.directory)
        facts = dict(found.facts())
        width = max(map(len, facts))
        print(options.directory)
        print("\n".join(f"{name:{width}}  {value}" for name, value in facts.items()))
        for title, lines in (("weights", found.weights), ("optimizer", found.optimizer)):
            if lines:
                print(f"\n{title}, {size(total(lines, 'bytes'))}\n{table(lines, options.tensors)}")
        print("\n" + (_verified(found) if options.verify else "not verified"))
    except ValueError as error:
        print(f"tpformer checkpoint: {error}", file=sys.stderr)
        return 1
    return 0


def run_convert(options: argparse.Namespace) -> int:
    """Convert and say what was written; 1 if the source is damaged or the target in the way, otherwise 0."""
    to = options.to or ("huggingface" if (options.source / META).exists() else "checkpoint")
    try:
        with tqdm(unit="B", unit_scale=True, desc="reading", leave=False, dynamic_ncols=True) as bar:
            if to == "checkpoint":
                if options.dtype or options.overwrite:
                    raise ValueError("--dtype and --overwrite are for a Hugging Face directory: checkpoints are fp32")
                made = to_checkpoint(options.source, options.target, progress=bar.update)
            else:
                dtype = getattr(torch, options.dtype) if options.dtype else None
                made = options.target
                to_huggingface(options.source, made, dtype, overwrite=options.overwrite, progress=bar.update)
    except (ValueError, OSError) as error:
        print(f"tpformer checkpoint: {error}", file=sys.stderr)
        return 1
    print(f"{made}, a {'checkpoint' if to == 'checkpoint' else 'Hugging Face directory'}")
    return 0


def _verified(found: Found) -> str:
    """Read everything again. Raises ValueError naming what is damaged."""
    if not found.meta:
        return "headers and sizes are whole; there are no checksums"
    count = total(found.weights, "bytes") + total(found.optimizer, "bytes")
    with tqdm(total=count, unit="B", unit_scale=True, desc="verifying", leave=False, dynamic_ncols=True) as bar:
        verify(found.path, progress=bar.update)
    return "every checksum is right"
