"""Checks and times every provider of one case: nothing is timed that does not first agree with plain torch in fp32."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.device_timing import Call, Stopwatch, Work, interleave, stopwatch, summary
from benchmarks.kernel_cases import Case, Source
from benchmarks.kernel_providers import Leaves, Outputs, Provider

# ‖ours - reference‖ / ‖reference‖ of any output or gradient; bf16 alone makes 2e-3, torch's own loss in bf16 1e-2
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
MOST_SETS = 64
CACHES = 4  # how many times the L2 cache the sets of inputs hold together

Row = dict[str, Any]


REPEATS = 50
"""How often launch options must give the same bits before they enter a table."""


class WrongResult(Exception):
    """A provider does not compute the op."""


@dataclass(frozen=True)
class Ceiling:
    """What the device can do at most, sampled among the contenders."""

    name: str
    watch: Stopwatch
    amount: float
    """Bytes or floating-point operations of one call."""


def measure(case: Case, chosen: Collection[str], ceiling: Ceiling, device: torch.device, rounds: int) -> list[Row]:
    """One row for each provider and direction; of one that fails a single row, with the first line of its error."""
    contenders: dict[str, Contender] = {}
    rows: list[Row] = []
    for provider in (p for p in case.providers if p.name in chosen):
        try:
            contender = Contender(case, provider, device)
            contender.check()
            contenders[provider.name] = contender
        except Exception as error:  # whatever a library or a compiler may raise: the others go on
            rows.append(_row(case, provider.name, None) | {"error": first_line(error)})
    for direction in case.directions:
        watches: dict[str, Stopwatch] = {}
        for name, contender in contenders.items():
            try:
                watches[name] = stopwatch(contender.work(direction), device)
            except Exception as error:
                rows.append(_row(case, name, direction) | {"error": first_line(error)})
        samples = interleave({**watches, ceiling.name: ceiling.watch}, rounds)
        rate = ceiling.amount / summary(samples.pop(ceiling.name))["median_ms"]
        rows += [_timed_row(case, name, direction, watches[name], samples[name], rate) for name in watches]
        del watches  # their graphs hold memory
        harness.release_memory(device)
    return rows


def first_line(error: BaseException) -> str:
    """What an error says, short."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:200]


class Contender:
    """One provider of one case, with as many sets of inputs as the cache cannot hold."""

    def __init__(self, case: Case, provider: Provider, device: torch.device) -> None:
        self.case, self.provider, self.device = case, provider, device
        self.sets = [self._leaves(seed) for seed in range(_number_of_sets(case, device))]
        self.upstream: list[Leaves] = []

    def check(self) -> None:
        """Raises WrongResult unless outputs and gradients are the reference's, in fp32."""
        provider = self.provider
        if not provider.wanted:
            return
        leaves = self._leaves(seed=1000)
        copies = [x.detach().clone() for x in leaves]
        wide = [_leaf(x.float() if x.is_floating_point() else x, i < provider.wanted) for i, x in enumerate(copies)]
        _poison(leaves)
        outputs = _tuple(provider.run(*leaves))
        upstream = self._upstream(outputs, seed=1001)
        # copies again: some write their gradients over those they are given
        grads = torch.autograd.grad(outputs, leaves[: provider.wanted], [x.clone() for x in upstream])
        seen = {"grads": grads} if provider.observed else {}
        expected = _tuple(provider.reference(*wide, **seen))
        tolerance = TOLERANCE[self.case.dtype]
        compare("output", outputs, expected, tolerance)
        wide_upstream = tuple(x.float() for x in upstream)
        expected_grads = torch.autograd.grad(expected, wide[: provider.wanted], wide_upstream)
        compare("gradient", grads, expected_grads, tolerance)

    def check_repeats(self) -> None:
        """Raises WrongResult unless outputs and gradients are the same bit for bit, time after time.

        An assembler that overlaps what it must not is right most times (kernels whose dots read registers on sm_90).
        """
        first = self._run_once()
        for number in range(REPEATS):
            if not all(torch.equal(x, y) for x, y in zip(self._run_once(), first, strict=True)):
                raise WrongResult(f"other numbers when it is run again (time {number + 2})")

    def _run_once(self) -> Leaves:
        leaves = self._leaves(seed=1000)
        outputs = _tuple(self.provider.run(*leaves))
        if not self.provider.wanted:
            return outputs
        upstream = self._upstream(outputs, seed=1001)
        return (*outputs, *torch.autograd.grad(outputs, leaves[: self.provider.wanted], upstream))

    def work(self, direction: str) -> Work:
        """What the clock is to be held to."""
        if not self.provider.wanted:
            return Work(tuple(partial(self.provider.run, *leaves) for leaves in self.sets))
        if not self.upstream:
            self.upstream = [self._upstream(_tuple(self.provider.run(*x)), seed) for seed, x in enumerate(self.sets)]
        calls = tuple(self._call(direction, *pair) for pair in zip(self.sets, self.upstream, strict=True))
        return Work(calls, self._restorer() if self.case.overwritten else None)

    def _call(self, direction: str, leaves: Leaves, upstream: Leaves) -> Call:
        run, wanted = self.provider.run, leaves[: self.provider.wanted]
        if direction == "forward":
            return partial(run, *leaves)
        if direction == "backward":
            outputs = _tuple(run(*leaves))
            return partial(torch.autograd.grad, outputs, wanted, upstream, retain_graph=True)
        return lambda: torch.autograd.grad(_tuple(run(*leaves)), wanted, upstream)

    def _restorer(self) -> Call:
        """Write the first leaves as they were."""
        pristine = [self._leaves(seed)[0].detach() for seed in range(len(self.sets))]

        def restore() -> None:
            with torch.no_grad():
                for leaves, values in zip(self.sets, pristine, strict=True):
                    leaves[0].copy_(values)

        return restore

    def _leaves(self, seed: int) -> Leaves:
        arranged = self.provider.arrange(*self.case.make(Source.seeded(seed, self.case.dtype, self.device)))
        # copies, because a provider may write over its own
        return tuple(_leaf(x.detach().clone(), i < self.provider.wanted) for i, x in enumerate(arranged))

    def _upstream(self, outputs: tuple[Tensor, ...], seed: int) -> Leaves:
        """Random gradients of the outputs; 1 of a loss."""
        source = Source.seeded(seed, self.case.dtype, self.device)
        return tuple(torch.ones_like(y) if y.dim() == 0 else source.normal(*y.shape) for y in outputs)


def compare(kind: str, found: Leaves, expected: Leaves, tolerance: float) -> None:
    """Raises WrongResult if any tensor is further from its reference than the tolerance, or NaN."""
    if len(found) != len(expected):
        raise WrongResult(f"{len(found)} {kind}s instead of {len(expected)}")
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        if mine.shape != theirs.shape:
            raise WrongResult(f"{kind} {index} is {tuple(mine.shape)} instead of {tuple(theirs.shape)}")
        error = float((mine.detach().float() - theirs.detach()).norm() / theirs.detach().norm().clamp(min=1e-30))
        if not error <= tolerance:
            raise WrongResult(f"{kind} {index} is {error:.1e} off the reference, more than {tolerance:.0e}")


def copy_ceiling(device: torch.device) -> Ceiling:
    """Copy bandwidth of a large tensor, read and write counted."""
    count = 2**29 if device.type == "cuda" else 2**22
    source = torch.randn(count, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    watch = stopwatch(Work((partial(target.copy_, source),)), device)
    return Ceiling("copy", watch, 2.0 * count * source.element_size())


def matmul_ceiling(device: torch.device) -> Ceiling:
    """Rate of torch.mm on large random matrices: 8192³ in bf16, less on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    watch = stopwatch(Work((partial(torch.mm, a, b),)), device)
    return Ceiling("torch.mm", watch, 2.0 * n**3)


def _number_of_sets(case: Case, device: torch.device) -> int:
    if device.type != "cuda" or case.whole:
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, max(1, math.ceil(CACHES * cache / case.forward_bytes)))


def _leaf(x: Tensor, wanted: bool) -> Tensor:
    return x.requires_grad_(wanted)


def _tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _poison(leaves: Leaves) -> None:
    """Leave NaN in the memory that outputs are likely to get, so that what is not written shows."""
    buffers = [torch.full_like(x, torch.nan) for x in leaves if x.is_floating_point() for _ in range(2)]
    del buffers


def _row(case: Case, provider: str, direction: str | None) -> Row:
    return {
        "op": case.op,
        "size": case.size.label,
        "main": case.size.main,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "provider": provider,
        "direction": direction,
    }


def _timed_row(case: Case, name: str, direction: str, watch: Stopwatch, samples: list[float], ceiling: float) -> Row:
    """Rates in GB/s or TFLOP/s; `fraction` is of the ceiling as it was measured beside this row."""
    timing = summary(samples)
    flops = case.flops_of(direction)
    rate = (flops or case.bytes_of(direction)) / timing["median_ms"]  # per millisecond
    unit, per_unit = ("tflops", 1e9) if flops else ("gb_per_s", 1e6)
    return _row(case, name, direction) | {
        **timing,
        "bytes": case.bytes_of(direction),
        "flops": flops or None,
        unit: rate / per_unit,
        "ceiling": ceiling / per_unit,
        "fraction": rate / ceiling,
        "timing": watch.how,
        "samples": len(samples),
    }
