"""The command `tpformer`: each subcommand is a part's own."""

import argparse
import sys
from collections.abc import Sequence

from tpformer.checkpoint import command as checkpoint
from tpformer.doctor import report
from tpformer.planner import command as planner


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand that the arguments name; its exit status."""
    parser = argparse.ArgumentParser(prog="tpformer", description="Tensor-parallel Transformers.")
    commands = parser.add_subparsers(required=True, metavar="command")
    report.add_command(commands)
    checkpoint.add_command(commands)
    planner.add_command(commands)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
