"""`tpformer checkpoint`: look into a checkpoint or a Hugging Face directory, on the CPU and without processes."""

import argparse
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tpformer.checkpoint.inspect import Found, size, table, total
from tpformer.checkpoint.store import verify


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


def _verified(found: Found) -> str:
    """Read everything again. Raises ValueError naming what is damaged."""
    if not found.meta:
        return "headers and sizes are whole; there are no checksums"
    count = total(found.weights, "bytes") + total(found.optimizer, "bytes")
    with tqdm(total=count, unit="B", unit_scale=True, desc="verifying", leave=False, dynamic_ncols=True) as bar:
        verify(found.path, progress=bar.update)
    return "every checksum is right"
