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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from tests.kernels.compile_attention import ATTENTION
from tpformer_kernels import library, tables
from tpformer_kernels.jit import INTERPRETED, jit, tl, triton
from tpformer_kernels.norm_kernels import WIDE_BACKWARD, WIDE_FORWARD
from tpformer_kernels.softmax import WIDE

OPS: Any = torch.ops.tpformer
PROCESSES = 2
ROWS = 64  # a multiple of 16, so that Triton specialises on it as on the sizes of real batches


class Case(NamedTuple):
    """How a key of the tables is compiled: call(rows, size, dtype, **flags) calls the operators that ask for it."""

    call: Callable[..., object]
    flags: dict[str, tuple[Any, ...]]
    """All values of each flag; the first is the one that costs most."""
    last: int = 1 << 16
    """The largest size that the last row serves."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)


def norm_forward(rows: int, size: int, dtype: torch.dtype, residual: bool, bias: bool, center: bool) -> None:
    x, weight = torch.empty(rows, size, dtype=dtype), torch.empty(size, dtype=dtype)
    OPS.norm_forward(x, x if residual else None, weight, weight if bias else None, 1e-5, center)


def norm_backward(
    rows: int, size: int, dtype: torch.dtype, total: bool, center: bool, with_weight: bool, with_bias: bool
) -> None:
    x, statistic = torch.empty(rows, size, dtype=dtype), torch.empty(rows, 1)
    weight = torch.empty(size, dtype=dtype)
    OPS.norm_backward(x, x if total else None, x, weight, statistic, statistic, center, with_weight, with_bias)


def rope(rows: int, size: int, dtype: torch.dtype, heads: tuple[int, int], pack: bool, inverse: bool) -> None:
    kv_heads, group = heads
    cos = torch.empty(rows, 1, size // 2)
    q, k = torch.empty(1, rows, kv_heads, group, size, dtype=dtype), torch.empty(1, rows, kv_heads, size, dtype=dtype)
    if pack:
        OPS.rope_pack(q.flatten(2, 3), k, k, cos, cos)
    else:
        OPS.rope(q, k, cos, cos, inverse)


def gated(rows: int, size: int, dtype: torch.dtype, activation: int) -> None:
    pairs = torch.empty(1, 2 * size, dtype=dtype)
    OPS.gated_backward(OPS.gated_forward(pairs, activation), pairs, activation)


def bias_gelu(rows: int, size: int, dtype: torch.dtype, tanh: bool, bias: bool, with_bias: bool) -> None:
    x, vector = torch.empty(rows, size, dtype=dtype), torch.empty(size, dtype=dtype) if bias else None
    OPS.bias_gelu_backward(OPS.bias_gelu_forward(x, vector, tanh), x, vector, tanh, with_bias)


def dropout_add(rows: int, size: int, dtype: torch.dtype, residual: bool) -> None:
    x = torch.empty(1, rows, size, dtype=dtype)
    OPS.dropout_add(x, x if residual else None, 0.1, 1, 2, 3)


def cross_entropy(rows: int, size: int, dtype: torch.dtype, softcap: float, with_sum: bool, inplace: bool) -> None:
    logits, vector, targets = torch.empty(rows, size, dtype=dtype), torch.empty(rows), torch.zeros(rows).long()
    OPS.cross_entropy_statistics(logits, targets, size, with_sum, softcap)
    gradient = OPS.cross_entropy_gradient_ if inplace else OPS.cross_entropy_gradient
    gradient(logits, targets, size, vector, vector, vector, vector, softcap)


def softmax(rows: int, size: int, dtype: torch.dtype, mask: torch.dtype | None, causal: bool) -> None:
    x = torch.empty(2, rows, size, dtype=dtype)
    OPS.softmax_forward(x, None if mask is None else torch.empty(size, dtype=mask).expand(x.shape), 0.5, causal)
    OPS.softmax_backward(x, x, 0.5, causal)


@jit
def _spilling_kernel(x_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One warp sorts out far more numbers than it has registers."""
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + column, column < size, 0.0)
    x -= tl.sum(x, 0)
    tl.store(x_ptr + column, x, column < size)


@jit
def _sharing_kernel(x_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A matmul that keeps more tiles in flight than shared memory holds."""
    row = tl.arange(0, BLOCK)
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, size, BLOCK):
        tile = tl.load(x_ptr + row[:, None] * size + start + row[None, :])
        product = tl.dot(tile, tl.load(x_ptr + (start + row[:, None]) * size + row[None, :]), product)
    tl.store(x_ptr + row[:, None] * size + row[None, :], product.to(x_ptr.dtype.element_ty))


def spilling(rows: int, size: int, dtype: torch.dtype) -> None:
    library.launch(_spilling_kernel, (1,), torch.empty(size, dtype=dtype), size, BLOCK=1 << 14, num_warps=1)


def sharing(rows: int, size: int, dtype: torch.dtype) -> None:
    library.launch(_sharing_kernel, (1,), torch.empty(16), size, BLOCK=128, num_warps=8, num_stages=5)


BOTH = (True, False)
NORM_FORWARD = {"residual": BOTH, "bias": BOTH, "center": BOTH}
NORM_BACKWARD = {"total": BOTH, "center": BOTH, "with_weight": BOTH, "with_bias": BOTH}
GATED = {"activation": (1, 2, 0)}
BIAS_GELU = {"tanh": (False, True), "bias": BOTH, "with_bias": BOTH}
SOFTMAX = {"mask": (torch.float32, torch.bool, None), "causal": BOTH}
CROSS_ENTROPY = {"softcap": (30.0, 0.0), "with_sum": BOTH, "inplace": BOTH}

CASES: dict[str, Case] = {
    "norm_forward": Case(norm_forward, NORM_FORWARD, last=WIDE_FORWARD),
    "norm_forward_wide": Case(norm_forward, NORM_FORWARD),
    "norm_backward": Case(norm_backward, NORM_BACKWARD, last=WIDE_BACKWARD),
    "norm_backward_wide": Case(norm_backward, NORM_BACKWARD),
    "norm_weight_wide": Case(norm_backward, NORM_BACKWARD),
    "rope": Case(rope, {"heads": ((8, 4), (8, 1), (1, 8), (1, 1)), "pack": BOTH, "inverse": BOTH}, last=256),
    "gated_forward": Case(gated, GATED),
    "gated_backward": Case(gated, GATED),
    "bias_gelu_forward": Case(bias_gelu, BIAS_GELU),
    "bias_gelu_backward": Case(bias_gelu, BIAS_GELU),
    "dropout_add": Case(dropout_add, {"residual": BOTH}),
    "softmax_forward": Case(softmax, SOFTMAX, last=WIDE),
    "softmax_forward_wide": Case(softmax, SOFTMAX),
    "softmax_backward": Case(softmax, SOFTMAX, last=WIDE),
    "softmax_backward_wide": Case(softmax, SOFTMAX),
    "cross_entropy_statistics": Case(cross_entropy, CROSS_ENTROPY),
    "cross_entropy_gradient": Case(cross_entropy, CROSS_ENTROPY),
    **{name: Case(*fields) for name, fields in ATTENTION.items()},
}
CONTROLS = {"spilling": Case(spilling, {}), "sharing": Case(sharing, {})}
"""What must be complained about."""


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
    sizes = [row["up_to"] or case.last for row in rows]
    heaviest, *others = (
        dict(zip(case.flags, values, strict=True)) for values in itertools.product(*case.flags.values())
    )
    for size, dtype in itertools.product(sizes, case.dtypes):
        yield Call(ROWS, size, dtype, heaviest)
    once = [Call(ROWS, sizes[0], case.dtypes[0], flags) for flags in others]
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
    rows = [{"up_to": None}] if name in CONTROLS else tables.table(architecture)["kernels"][name]
    return compiler().compile(architecture, name, case, rows)


def main() -> None:
    """Prints the results, as a JSON list, to standard output."""
    # keys that share a case lie apart, so that the second finds in the cache what the first has compiled
    jobs = [(a, name) for name in CASES for a in tables.ARCHITECTURES if name in tables.table(a)["kernels"]]
    jobs += [(90, name) for name in CONTROLS]
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = pool.map(compile_case, *zip(*jobs, strict=True))
        json.dump([asdict(result) for result in results], sys.stdout)


if __name__ == "__main__":
    main()
