"""Every kernel compiles for every architecture of the tables and fits it; and all is well where Triton is absent."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.compile_only import CASES, CONTROLS, Kernel, Result
from tpformer_kernels.matmul_choice import best_loads
from tpformer_kernels.tables import ARCHITECTURES, table

ROOT = Path(__file__).parents[2]
PATHS = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
SHARED_KIB = {80: 163, 90: 227, 100: 227}
"""Shared memory that one program can have."""

pytestmark = pytest.mark.timeout(900)  # the first test waits for minutes of compilation


@pytest.fixture(scope="module")
def results(compiled: str) -> list[Result]:
    """Of all cases on all architectures."""
    return [Result(**{**r, "kernels": [Kernel(**kernel) for kernel in r["kernels"]]}) for r in json.loads(compiled)]


def complaints(kernel: Kernel) -> list[str]:
    """Why a kernel would be slow on its chip, or not launch at all."""
    found = []
    # a width that 16 does not divide takes more registers than its row of the table is for
    if kernel.regular and (kernel.stack or kernel.local):
        found.append(f"{kernel.stack} + {kernel.local} bytes a thread spill from {kernel.registers} registers")
    if kernel.shared > SHARED_KIB[kernel.architecture] * 1024:
        found.append(f"{kernel.shared / 1024:.0f} KiB of shared memory are more than there are")
    # C7510 and C7515: a wgmma that waits for the one before is two to five times slower
    found += [line for line in kernel.log.splitlines() if re.search(r"\bC75\d\d\b|wgmma.*serializ", line)]
    return [f"{kernel.name} on sm_{kernel.architecture}, {kernel.launch}: {text}" for text in found]


def uncompiled(architecture: int, kernels: dict[str, Any], results: Iterable[Result]) -> list[str]:
    """The keys of a table without a case, and the rows that no case has reached."""
    found = [f"{key} has no case" for key in kernels if key not in CASES]
    asked = [size for result in results if result.architecture == architecture for size in result.sizes]
    for key, rows in kernels.items():
        below = 0
        for row in rows:
            top = row["up_to"] or sys.maxsize
            if not any(name == key and below < size <= top for name, size in asked):
                found.append(f"{key} up to {row['up_to']} was not compiled")
            below = top
    return found


def misshapen(kernels: dict[str, Any]) -> list[str]:
    """Keys of a table whose rows do not ascend to one for all larger sizes, or differ in what they set."""
    found = []
    for key, rows in kernels.items():
        *limits, last = [row["up_to"] for row in rows]
        if last is not None or None in limits or limits != sorted(set(limits)):
            found.append(f"{key}: up_to is {[*limits, last]}")
        if any(row.keys() != rows[0].keys() for row in rows):
            found.append(f"{key}: its rows have different columns")
    return found


def launched(texts: Iterable[str]) -> set[str]:
    """Names of the kernels in source files: functions under @jit that no other one calls."""
    functions: set[str] = set()
    called: set[str] = set()
    for node in (node for text in texts for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
            functions.add(node.name)
            calls = (inner.func for inner in ast.walk(node) if isinstance(inner, ast.Call))
            called |= {function.id for function in calls if isinstance(function, ast.Name)}
    return functions - called


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_and_fits(results: list[Result], architecture: int) -> None:
    ours = [result for result in results if result.architecture == architecture and result.case in CASES]
    found = [error for result in ours for error in result.errors]
    found += [text for result in ours for kernel in result.kernels for text in complaints(kernel)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_and_every_kernel_is_compiled(results: list[Result], architecture: int) -> None:
    assert uncompiled(architecture, table(architecture)["kernels"], results) == []
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "kernels").rglob("*.py"))
    ours = [result for result in results if result.architecture == architecture and result.case in CASES]
    absent = {"matmul_descriptor_kernel"} if best_loads(architecture, "half") == "pointers" else set()
    assert {kernel.name for result in ours for kernel in result.kernels} == launched(sources) - absent


@pytest.mark.parametrize(("control", "text"), [("spilling", "spill from"), ("sharing", "of shared memory")])
def test_what_does_not_fit_is_reported(results: list[Result], control: str, text: str) -> None:
    """Negative control: a kernel that is too large, compiled like all others."""
    assert {result.case for result in results} == {*CASES, *CONTROLS}
    ours = [kernel for result in results if result.case == control for kernel in result.kernels]
    kernels = [kernel for kernel in ours if kernel.regular]
    assert kernels
    assert all(any(text in complaint for complaint in complaints(kernel)) for kernel in kernels)


def test_what_the_assembler_says_is_read(results: list[Result]) -> None:
    """Negative control: its log is there, and a serialised wgmma in it is reported."""
    kernel = next(kernel for result in results for kernel in result.kernels if not complaints(kernel))
    assert "spill stores" in kernel.log
    warning = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to x in the function 'f'"
    assert len(complaints(replace(kernel, log=f"{kernel.log}\nptxas info    : (C7510) {warning}"))) == 1
    assert len(complaints(replace(kernel, log=f"ptxas info    : (C7515) {warning}"))) == 1


def test_what_is_not_compiled_is_reported() -> None:
    """Negative control: a key without a case, a row that is not reached, a kernel that is not launched."""
    key = next(iter(CASES))
    rows = [{"up_to": 16}, {"up_to": 32}, {"up_to": None}]
    result = Result(key, 80, [(key, 16), (key, 33), ("new", 1)], [], [])
    assert uncompiled(80, {key: rows, "new": [{"up_to": None}]}, [result]) == [
        "new has no case",
        f"{key} up to 32 was not compiled",
    ]
    assert len(uncompiled(90, {key: rows}, [result])) == 3
    text = "@jit\ndef a():\n    b(0)\n@jit(x=1)\ndef b(x): pass\n@jit\ndef c(): pass\ndef d(): c()"
    assert launched([text, "@triton.jit\ndef e():\n    a.b()"]) == {"a", "c", "e"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tables_are_well_formed(architecture: int) -> None:
    read = table(architecture)
    assert read["architecture"] == architecture
    assert read["kernels"].keys() == table(ARCHITECTURES[0])["kernels"].keys()
    assert misshapen(read["kernels"]) == []


@pytest.mark.parametrize(
    "rows",
    [
        [{"up_to": 16}],
        [{"up_to": 16}, {"up_to": 16}, {"up_to": None}],
        [{"up_to": 32}, {"up_to": 16}, {"up_to": None}],
        [{"up_to": None}, {"up_to": None}],
        [{"up_to": 16, "num_warps": 4}, {"up_to": None}],
    ],
    ids=str,
)
def test_a_malformed_table_is_reported(rows: list[dict[str, Any]]) -> None:
    assert len(misshapen({"key": rows})) == 1


WITHOUT_TRITON = """
import inspect, sys
sys.modules["triton"] = None  # so that its import raises ImportError
import torch
import tpformer
import tpformer_kernels as k
assert not torch.cuda.is_initialized()
x, w, heads = torch.randn(2, 3, 8), torch.ones(8), torch.randn(2, 3, 4, 8)
targets, lse = torch.tensor([1, -1]), torch.zeros(2)
cos = torch.ones(3, 1, 4)
ops = {
    "rms_norm": (x, w, 1e-5), "add_rms_norm": (x, x, w, 1e-5),
    "layer_norm": (x, w, w, 1e-5), "add_layer_norm": (x, x, w, w, 1e-5),
    "gated_activation": (x, "silu"), "bias_gelu": (x, w), "dropout_add": (x, x, 0.1, (1, 2, 3)), "softmax": (x,),
    "matmul": (w[:3].diag(), x[0]),
    "attention": (heads, heads, heads), "attention_with_lse": (heads, heads, heads),
    "apply_rope": (heads, heads, cos, cos), "split_and_rotate": (heads.unsqueeze(2), cos, cos),
    "cross_entropy_statistics": (x[:, 0], targets, 8, True),
    "cross_entropy_gradient": (x[:, 0], targets, 8, lse, (lse, lse, lse)),
}
public = {name: getattr(k, name) for name in k.__all__ if inspect.isfunction(getattr(k, name))}
backends = {name: inspect.signature(f).parameters.get("backend") for name, f in public.items()}
chosen = {name for name, parameter in backends.items() if parameter is not None and parameter.default == "auto"}
chosen.remove("accumulate_")  # returns nothing
chosen.remove("explain_attention")  # which computes nothing
assert ops.keys() == chosen, ops.keys() ^ chosen
for name, arguments in ops.items():
    for mine, theirs in zip(*(public[name](*arguments, backend=b) for b in ("auto", "torch"))):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    try:
        public[name](*arguments, backend="triton")
    except ValueError as error:
        assert "needs the package triton, which is not installed" in str(error), error
    else:
        raise AssertionError(f"{name} ran")
assert not torch.cuda.is_initialized()
"""


def test_without_triton_the_references_run(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", WITHOUT_TRITON],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
