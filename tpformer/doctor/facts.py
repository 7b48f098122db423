"""What a run stands on: `gather` asks the machine once, and what cannot be asked is None."""

import ctypes
import functools
import itertools
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy
import torch
import torch.distributed as dist

from tpformer_kernels.jit import INTERPRETED, triton
from tpformer_kernels.onednn import onednn_is_possible, onednn_speed
from tpformer_kernels.tables import ARCHITECTURES, architecture_of, table

PREFIXES = ("CUDA_", "NCCL_", "TORCH_", "PYTORCH_", "TRITON_", "OMP_NUM_THREADS")
"""Variables of the environment that change a run."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class GPU:
    """One GPU that torch sees."""

    name: str
    capability: int
    memory: int
    multiprocessors: int
    table: int


@dataclass(frozen=True)
class Ptxas:
    """The assembler that Triton uses for one kind of GPU, and the variable that would name another."""

    version: str
    path: str
    variable: str


@dataclass(frozen=True)
class Facts:
    """What the machine answered; the defaults are of one without Triton or a GPU."""

    torch: str
    numpy: str
    cpu: str | None = None
    cores: str | None = None
    memory: int | None = None
    torch_cuda: str | None = None
    blas: str | None = None
    cpu_matmul: str | None = None
    gloo: bool | None = None
    nccl: str | None = None
    triton: str | None = None
    interpreted: bool = False
    ptxas: Mapping[int, Ptxas] = field(default_factory=dict)
    compiler: str | None = None
    headers: bool | None = None
    driver: str | None = None
    driver_cuda: str | None = None
    driver_gpus: tuple[str, ...] = ()
    gpus: tuple[GPU, ...] = ()
    tables: Mapping[int, str | None] = field(default_factory=dict)
    blocked: tuple[tuple[int, int], ...] | None = None
    links: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def probe(ask: Callable[P, R]) -> Callable[P, R | None]:
    """The same question, answered None where it cannot be: a report must not fail on what it reports."""

    @functools.wraps(ask)
    def answer(*args: P.args, **kwargs: P.kwargs) -> R | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return ask(*args, **kwargs)
            except Exception:
                return None

    return answer


@probe
def output(*command: str) -> str:
    """What a command prints, if it is there and succeeds."""
    return subprocess.run(command, capture_output=True, check=True, timeout=20, text=True, errors="replace").stdout


@probe
def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


@probe
def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


@probe
def physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@probe
def blas() -> str:
    """The libraries that torch's CPU operations use, from the description of its build."""
    patterns = {
        "BLAS": r"BLAS_INFO=(\w+)",
        "MKL": r"Math Kernel Library Version ([\d.]+)",
        "oneDNN": r"MKL-DNN v([\d.]+)",
        "OpenMP": r"a\.k\.a\. OpenMP ([\d.]+)",
        "": r"CPU capability usage: (\S+)",
    }
    matches = ((name, re.search(pattern, torch.__config__.show())) for name, pattern in patterns.items())
    found = [f"{name} {match[1]}".strip() for name, match in matches if match]
    return ", ".join([*found, f"{torch.get_num_threads()} threads"])


@probe
def cpu_matmul() -> str:
    """What multiplies large fp32 matrices on this CPU; times it where there is a choice."""
    if not onednn_is_possible():
        return "torch.mm (nothing is known to be faster here)"
    speed = onednn_speed(torch.get_num_threads())
    return f"{'oneDNN' if speed > 1 else 'torch.mm'}, as measured: oneDNN has {speed:.2f} x the speed of torch.mm"


@probe
def gloo() -> bool:
    return dist.is_available() and dist.is_gloo_available()


@probe
def nccl() -> str | None:
    """Its version."""
    available = dist.is_available() and dist.is_nccl_available()
    return ".".join(map(str, torch.cuda.nccl.version())) if available else None


@probe
def ptxas(capability: int) -> Ptxas:
    """Triton's own choice: from 3.9 on Hopper's is the one called ptxas-blackwell."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(capability)
    usual = tool.path == knobs.nvidia.ptxas.path
    return Ptxas(tool.version, tool.path, "TRITON_PTXAS_PATH" if usual else "TRITON_PTXAS_BLACKWELL_PATH")


@probe
def compiler(environment: Mapping[str, str]) -> str | None:
    """The C compiler that Triton would take: CC, or gcc, or clang."""
    names = [environment["CC"]] if environment.get("CC") else ["gcc", "clang"]
    return next((path for name in names if (path := shutil.which(name, path=environment.get("PATH", "")))), None)


@probe
def headers() -> bool:
    """Whether Python's own are here, which what Triton compiles includes."""
    return Path(sysconfig.get_path("include"), "Python.h").exists()


def module_version(text: str) -> str | None:
    """The driver's version in what its kernel module says of itself."""
    found = re.search(r"NVRM version:.*?\s(\d{3,}\.[\d.]+)", text)
    return found[1] if found else None


@probe
def kernel_module() -> str | None:
    """The driver's version, where there is no nvidia-smi to ask."""
    return module_version(Path("/proc/driver/nvidia/version").read_text())


@probe
def driver_cuda() -> str | None:
    """The newest CUDA that the driver supports, asked of the driver's library."""
    library, version = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1"), ctypes.c_int()
    failed = library.cuDriverGetVersion(ctypes.byref(version))
    return None if failed else f"{version.value // 1000}.{version.value % 1000 // 10}"


@probe
def gpu(index: int) -> GPU:
    """One GPU as torch numbers them."""
    found = torch.cuda.get_device_properties(index)
    capability, serving = 10 * found.major + found.minor, architecture_of(torch.device("cuda", index))
    return GPU(found.name, capability, found.total_memory, found.multi_processor_count, serving)


@probe
def gpu_count() -> int:
    return torch.cuda.device_count() if torch.version.cuda and torch.cuda.is_available() else 0


@probe
def blocked(count: int) -> tuple[tuple[int, int], ...]:
    """The pairs of GPUs of which one cannot read the other's memory."""
    reach = torch.cuda.can_device_access_peer
    return tuple((i, j) for i, j in itertools.combinations(range(count), 2) if not (reach(i, j) and reach(j, i)))


@probe
def measured(architecture: int) -> str | None:
    """On what a launch table was measured; None if it was not."""
    note = table(architecture)["measured"]
    return f"measured on {note.get('device')}, {note.get('date')}" if note else None


def links(topology: str) -> tuple[str, ...]:
    """The link of each pair of GPUs in the output of `nvidia-smi topo -m`: NV18, PIX, SYS and so on."""
    lines = [line.split() for line in re.sub(r"\x1b\[[\d;]*m", "", topology).splitlines()]
    rows = [words[1:] for words in lines if len(words) > 1 and re.fullmatch(r"GPU\d+", words[0]) and "X" in words]
    return tuple(row[j] for i, row in enumerate(rows) for j in range(i + 1, len(rows)) if j < len(row))


def gather(environment: Mapping[str, str] | None = None) -> Facts:
    """Ask the machine everything, once."""
    environment = os.environ if environment is None else environment
    smi = output("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader") or ""
    seen = [line.split(", ", 1) for line in smi.splitlines() if ", " in line]
    gpus = tuple(found for index in range(gpu_count() or 0) if (found := gpu(index)) is not None)
    assemblers = {kind: ptxas(kind) for kind in sorted({g.capability for g in gpus} or ARCHITECTURES)}
    total, usable = os.cpu_count(), usable_cores()
    return Facts(
        torch=str(torch.__version__),
        numpy=numpy.__version__,
        cpu=cpu_model() or platform.processor() or None,
        cores=f"{usable} of {total} logical cores" if usable else f"{total} logical cores",
        memory=physical_memory(),
        torch_cuda=torch.version.cuda,
        blas=blas(),
        cpu_matmul=cpu_matmul(),
        gloo=gloo(),
        nccl=nccl(),
        triton=None if triton is None else triton.__version__,
        interpreted=INTERPRETED,
        ptxas={kind: found for kind, found in assemblers.items() if found is not None},
        compiler=compiler(environment),
        headers=headers(),
        driver=seen[0][0] if seen else kernel_module(),
        driver_cuda=driver_cuda(),
        driver_gpus=tuple(name for _, name in seen),
        gpus=gpus,
        tables={kind: measured(kind) for kind in sorted({g.table for g in gpus})},
        blocked=blocked(len(gpus)),
        links=links(output("nvidia-smi", "topo", "-m") or "") if len(gpus) > 1 else (),
        environment={name: value for name, value in sorted(environment.items()) if name.startswith(PREFIXES)},
    )
