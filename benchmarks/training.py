"""Time forward + backward of a Llama beside other frameworks.

    torchrun --nproc-per-node 2 -m benchmarks.training    tensor parallelism, on the ranks of one machine
    python -m benchmarks.training --device cuda           kernels and compilers, in one process on one GPU

Each has flags of its own, which --help lists. Under torchrun --device chooses between GPUs (the default where
there are some) and cpu.
"""

import argparse

import torch.distributed as dist

from benchmarks import one_gpu, tensor_parallel


def main() -> None:
    """Read --device, which decides what is compared; the other flags belong to the comparison."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    flags, others = parser.parse_known_args()
    if flags.device == "cuda" and not dist.is_torchelastic_launched():
        one_gpu.run(others)
    else:
        tensor_parallel.run(others, flags.device)


if __name__ == "__main__":
    main()
