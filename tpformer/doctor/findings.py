"""What of the facts is known to be bad, and what to do about it: a check is a function of the facts alone."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tpformer.doctor.facts import Facts
from tpformer_kernels.tables import ARCHITECTURES

MINIMUM_TORCH, MINIMUM_TRITON = (2, 11), (3, 6)
"""pyproject.toml's."""
HOPPER = 90
FIXED_PTXAS = (13, 3)
"""The first that keeps a register until an asynchronous WGMMA has read it (triton-lang/triton#11781)."""


@dataclass(frozen=True)
class Finding:
    """One warning: the rows of the report that it is about, what is wrong, what to do."""

    about: tuple[str, ...]
    problem: str
    advice: str


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu is (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def old_torch(facts: Facts) -> Iterator[Finding]:
    if numbers(facts.torch) < MINIMUM_TORCH:
        need = dotted(MINIMUM_TORCH)
        yield Finding(("torch",), f"torch {facts.torch} is older than {need}", f"install torch {need} or newer")


def old_triton(facts: Facts) -> Iterator[Finding]:
    if facts.triton is not None and numbers(facts.triton) < MINIMUM_TRITON:
        need = dotted(MINIMUM_TRITON)
        advice = f"install a torch that brings triton {need} or newer, or run with backend 'torch'"
        yield Finding(("triton",), f"triton {facts.triton} is older than {need}", advice)


def numpy_under_the_interpreter(facts: Facts) -> Iterator[Finding]:
    if facts.interpreted and numbers(facts.triton or "")[:2] == (3, 6) and numbers(facts.numpy) >= (2, 4):
        problem = f"the interpreter of triton {facts.triton} fails with numpy {facts.numpy} (triton-lang/triton#9171)"
        yield Finding(("triton", "numpy"), problem, "install 'numpy<2.4', or a newer triton")


def interpreted_beside_a_gpu(facts: Facts) -> Iterator[Finding]:
    if facts.interpreted and (facts.gpus or facts.driver_gpus):
        problem = "TRITON_INTERPRET is set on a machine with a GPU: every kernel runs on the CPU, very slowly"
        yield Finding(("triton",), problem, "unset TRITON_INTERPRET")


def torch_without_cuda(facts: Facts) -> Iterator[Finding]:
    if facts.driver_gpus and facts.torch_cuda is None:
        problem = f"there is a GPU ({facts.driver_gpus[0]}), but torch {facts.torch} is built without CUDA"
        yield Finding(("torch", "GPU"), problem, "install a CUDA build: https://pytorch.org/get-started/locally")


def old_driver(facts: Facts) -> Iterator[Finding]:
    """Within one major version CUDA runs on an older driver; across two it does not."""
    built, supported = numbers(facts.torch_cuda or ""), numbers(facts.driver_cuda or "")
    if built and supported and supported[0] < built[0]:
        problem = f"the driver supports CUDA {facts.driver_cuda}, but torch is built with {facts.torch_cuda}"
        advice = f"install a driver for CUDA {built[0]}, or a torch built with CUDA {supported[0]}"
        yield Finding(("driver", "torch"), problem, advice)


def unseen_gpu(facts: Facts) -> Iterator[Finding]:
    asked = "CUDA_VISIBLE_DEVICES" in facts.environment
    if facts.driver_gpus and facts.torch_cuda and not facts.gpus and not asked and not any(old_driver(facts)):
        problem = f"the driver has {len(facts.driver_gpus)} GPU(s), but torch sees none"
        advice = "python -c 'import torch; torch.cuda.init()' says why; with NVSwitch, is nvidia-fabricmanager running?"
        yield Finding(("GPU",), problem, advice)


def old_gpu(facts: Facts) -> Iterator[Finding]:
    oldest = min(ARCHITECTURES)
    if about := tuple(f"GPU {i}" for i, gpu in enumerate(facts.gpus) if gpu.capability < oldest):
        problem = f"older than sm_{oldest}: no launch table is for it, and bf16 is slow or absent"
        yield Finding(about, problem, f"use a GPU from sm_{oldest} on, or backend 'torch' with --precision fp32")


def miscompiling_ptxas(facts: Facts) -> Iterator[Finding]:
    tool = facts.ptxas.get(HOPPER)
    hopper = any(gpu.capability == HOPPER for gpu in facts.gpus)
    if tool is not None and hopper and numbers(tool.version) < FIXED_PTXAS:
        problem = (
            f"ptxas {tool.version} can miscompile a tl.dot whose first operand is in registers (WGMMA on sm_{HOPPER}, "
            "as in attention): silently wrong results (triton-lang/triton#11781)"
        )
        advice = f"install nvidia-cuda-nvcc {dotted(FIXED_PTXAS)} or newer and set {tool.variable} to its bin/ptxas"
        if numbers(facts.driver_cuda or "13") < FIXED_PTXAS[:1]:
            advice += f"; what it assembles needs a driver for CUDA {FIXED_PTXAS[0]}"
        yield Finding((f"ptxas for sm_{HOPPER}",), problem, advice)


def ignored_ptxas(facts: Facts) -> Iterator[Finding]:
    for variable in sorted({tool.variable for tool in facts.ptxas.values()} & facts.environment.keys()):
        asked = facts.environment[variable]
        own = {kind: tool for kind, tool in facts.ptxas.items() if tool.variable == variable and tool.path != asked}
        if asked and own:
            problem = f"{asked} does not run as ptxas, and Triton takes its own without a word"
            about = (variable, *(f"ptxas for sm_{kind}" for kind in own))
            yield Finding(about, problem, "let the variable name a ptxas that runs, or unset it")


def no_compiler(facts: Facts) -> Iterator[Finding]:
    if facts.triton is not None and facts.gpus and facts.compiler is None:
        problem = "no C compiler, which Triton needs at run time to launch a kernel"
        yield Finding(("C compiler",), problem, "install gcc or clang, or let CC name one")


def no_headers(facts: Facts) -> Iterator[Finding]:
    if facts.triton is not None and facts.gpus and facts.headers is False:
        problem = "no Python.h, which Triton needs at run time to launch a kernel"
        yield Finding(("C compiler",), problem, "install Python's development headers (python3-dev, python3-devel)")


def unmeasured_table(facts: Facts) -> Iterator[Finding]:
    for kind, note in facts.tables.items():
        if note is None and facts.triton is not None:
            problem = f"the launch options for sm_{kind} are derived, not measured: right, but perhaps not the fastest"
            yield Finding((f"launch table sm_{kind}",), problem, "make tune ARGS=--write")


def no_peer_access(facts: Facts) -> Iterator[Finding]:
    if facts.blocked:
        shown = ", ".join(f"{i}-{j}" for i, j in facts.blocked[:6]) + (", ..." if len(facts.blocked) > 6 else "")
        problem = f"GPUs that cannot read each other's memory: {shown}; what tp sends goes through the host"
        advice = "look for ACS, the IOMMU or the container in the way; keep tp within GPUs that can"
        yield Finding(("P2P",), problem, advice)


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    old_torch,
    old_triton,
    numpy_under_the_interpreter,
    interpreted_beside_a_gpu,
    torch_without_cuda,
    old_driver,
    unseen_gpu,
    old_gpu,
    miscompiling_ptxas,
    ignored_ptxas,
    no_compiler,
    no_headers,
    unmeasured_table,
    no_peer_access,
)


def findings(facts: Facts) -> list[Finding]:
    """Every warning that the facts deserve."""
    return [finding for check in CHECKS for finding in check(facts)]
