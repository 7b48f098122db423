"""What a Llama of 70 billion parameters takes on 512 GPUs: the best layouts, where the time goes, and how to run it.

python examples/plan_a_run.py

`tpformer plan --help` is the same from the command line. Nothing runs and no GPU is needed: all of it is predicted.
"""

import argparse
import sys

import tpformer
from tpformer.planner.report import table


def main(arguments: list[str]) -> None:
    """Plan, and show in three ways what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="llama-70b")
    parser.add_argument("--gpus", type=int, default=512)
    parser.add_argument("--device", default="h100-sxm")
    options = parser.parse_args(arguments)
    try:
        plans = tpformer.plan(options.model, options.gpus, options.device, tokens_per_step=4 * 2**20, seq_len=8192)
    except ValueError as error:
        sys.exit(f"plan_a_run.py: error: {error}")
    print(table(plans[:5]))

    best = plans[0]
    days = 1e12 / best.tokens_per_second / 86400
    print(f"\na trillion tokens would take {days:.0f} days; of a step's {best.seconds:.2f} s")
    for kind in ("compute", "recompute", "tp", "pp", "dp", "bubble", "optimizer"):
        print(f"  {kind:10} {best.time.of(kind) / best.seconds:6.1%}")

    # the same question, put to the plans: what is the best without a pipeline?
    flat = next((plan for plan in plans if plan.candidate.parallel.pp == 1), None)
    if flat is not None:
        print(f"without a pipeline it would take {flat.seconds / best.seconds:.2f} times as long")


if __name__ == "__main__":
    main(sys.argv[1:])
