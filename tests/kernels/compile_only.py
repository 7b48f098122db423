"""Compiles every kernel for every row of every table, without a GPU: `python -m tests.kernels.compile_only`.

The operators are called on CPU tensors, and each launch compiles instead, so that what is compiled is what would be
launched. It must run without TRITON_INTERPRET and with TRITON_DUMP_PTXAS_LOG=1; an empty TRITON_CACHE_DIR shows all.
"""

import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from tests.kernels.compile_cases import CASES, CONTROLS, Case
from tpformer_kernels import library, tables
from tpformer_kernels.jit import INTERPRETED, triton

PROCESSES = 2
ROWS = 64  # a multiple of 16, so that Triton specialises on it as on the sizes of real batches


class Call(NamedTuple):
    """One call of a case."""

    rows: int
    size: int
    dtype: torch.dtype
    flags: dict[str, Any]


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel and what the assembler says about it."""

    case: str
    architecture: int
    name: str
    launch: str  # by which call and with which options, for the reader of a complaint
    regular: bool  # in shapes as models have them
    registers: int
    stack: int
    local: int
    shared: int
    log: str


@dataclass(frozen=True)
class Result:
    """What the calls of one case came to on one architecture."""

    case: str
    architecture: int
    sizes: list[tuple[str, int]]  # every key and size that the table was asked for
    kernels: list[Kernel]
    errors: list[str]  # what did not compile


def calls(case: Case, rows: list[dict[str, Any]], architecture: int) -> Iterator[Call]:
    """Each row of the table with every flag set, and each other combination of flags and shapes once."""
    if case.launches is not None:
        yield from itertools.starmap(Call, case.launches(architecture))
        return
    sizes = [row["up_to"] or case.last for row in rows]
    heaviest, *others = (
        dict(zip(case.flags, values, strict=True)) for values in itertools.product(*case.flags.values())
    )
    for size, dtype in itertools.product(sizes, case.dtypes):
        yield Call(ROWS, size, dtype, heaviest)
    once = [Call(ROWS, sizes[0], case.dtypes[0], flags) for flags in others]
    if case.any_shape:
        once += [
            Call(ROWS, sizes[0], torch.float16, heaviest),
            Call(1, sizes[-1] - 2, case.dtypes[0], heaviest),  # Triton compiles anew for a 1, and for what 16 divides
            Call(ROWS - 1, 2, torch.float32, heaviest),
        ]
    # on one architecture each, for the sake of time
    yield from once[tables.ARCHITECTURES.index(architecture) :: len(tables.ARCHITECTURES)]


class Compiler:
    """Stands in for the device: Triton's driver, and what a launch and the choice of options come to."""

    def __init__(self) -> None:
        assert not INTERPRETED, "Triton interprets here, it does not compile"
        self.architecture = 0
        self.case = self.call = ""
        self.regular = True
        self.sizes: list[tuple[str, int]] = []
        self.kernels: list[Kernel] = []
        self.errors: list[str] = []
        run, options = triton.runtime.jit.JITFunction.run, tables.options

        def launch(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **meta: Any) -> None:
            with contextlib.redirect_stdout(io.StringIO()) as log:
                compiled = run(kernel, *arguments, grid=grid, warmup=True, **meta)
            if log.getvalue():  # else it was compiled, and recorded, before
                self.kernels.append(self._record(kernel.__name__, compiled, meta, log.getvalue()))

        def asked_options(kernel: str, size: int, device: torch.device) -> dict[str, int]:
            self.sizes.append((kernel, size))
            return options(kernel, size, device)

        triton.runtime.driver.set_active(self)
        triton.runtime.jit.JITFunction.run = launch
        library.INTERPRETED = True  # launch on CPU tensors too
        tables.architecture_of = lambda device: self.architecture  # type: ignore[assignment]
        for name, module in list(sys.modules.items()):
            if name.startswith("tpformer_kernels.") and getattr(module, "options", None) is options:
                module.options = asked_options  # type: ignore[attr-defined]

    def compile(self, architecture: int, name: str, case: Case, rows: list[dict[str, Any]]) -> Result:
        """Everything that a case launches."""
        self.architecture, self.case, self.sizes, self.kernels, self.errors = architecture, name, [], [], []
        for call in calls(case, rows, architecture):
            self.regular = call.rows == ROWS
            self.call = f"{call.dtype} ({call.rows}, {call.size}) {call.flags}"
            try:
                case.call(call.rows, call.size, call.dtype, **call.flags)
            except Exception as error:  # the other calls are of interest too
                self.errors.append(f"{name} on sm_{architecture}: {self.call}: {type(error).__name__}: {error}")
        return Result(name, architecture, sorted(set(self.sizes)), self.kernels, self.errors)

    def _record(self, name: str, compiled: Any, meta: dict[str, Any], log: str) -> Kernel:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        registers, stack, local = (int(re.findall(rf"\b{n}:(\d+)", usage)[-1]) for n in ("REG", "STACK", "LOCAL"))
        launch = f"{self.call} {meta}"
        where = (self.case, self.architecture, name, launch, self.regular)
        return Kernel(*where, registers, stack, local, compiled.metadata.shared, log)

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.architecture, 10)


@functools.cache
def compiler() -> Compiler:
    """This process's own; it changes Triton for good."""
    return Compiler()


def compile_case(architecture: int, name: str) -> Result:
    """One job of the pool."""
    case = CONTROLS[name] if name in CONTROLS else CASES[name]
    rows = [{"up_to": None}] if name in CONTROLS else tables.table(architecture)["kernels"].get(name, [])
    return compiler().compile(architecture, name, case, rows)


def has_rows(name: str, architecture: int) -> bool:
    return CASES[name].launches is not None or name in tables.table(architecture)["kernels"]


def main() -> None:
    """Prints the results, as a JSON list, to standard output."""
    results: list[Result] = []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.kernels.compile_cases"])  # what each process would import for seconds
    for architecture in tables.ARCHITECTURES:  # each in processes of its own: Triton 3.6 has crashed where they met
        # keys that share a case lie apart, so that the second finds in the cache what the first has compiled
        names = [name for name in CASES if has_rows(name, architecture)] + (
            list(CONTROLS) if architecture == 90 else []
        )
        with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
            results += pool.map(compile_case, [architecture] * len(names), names)
    json.dump([asdict(result) for result in results], sys.stdout)


if __name__ == "__main__":
    main()
