"""A block that a user builds from our layers and torch's own is the nn.Linear block whose class names it changed."""

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tpformer
from tests.distributed import Ranks
from tests.proofs.cases import TOLERANCE, Measured, mismatches
from tpformer import ColumnParallelLinear, Mesh, RowParallelLinear

FP64 = torch.float64
D, INNER = 12, 24


class Block(nn.Module):
    """Cross-gated residual block: two projections in, torch's own norms and convolution between, one out."""

    def __init__(self, up: nn.Module, gate: nn.Module, down: nn.Module):
        super().__init__()
        self.norm, self.up, self.gate, self.down = nn.LayerNorm(D), up, gate, down
        self.mix = nn.Conv1d(D, D, kernel_size=3, padding=1, groups=D)

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, d) -> (b, s, d)."""
        y = self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)  # not contiguous
        return x + self.down(torch.tanh(self.up(y)) * F.softplus(self.gate(x)))


class Wide(nn.Module):
    """Gathers its inner features, uses all of them in torch's modules, and splits them again."""

    def __init__(self, up: nn.Module, down: nn.Module):
        super().__init__()
        self.up, self.down, self.norm = up, down, nn.LayerNorm(INNER)
        self.scale = nn.Parameter(torch.rand(INNER))

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, d) -> (b, s, d)."""
        return self.down(self.norm(self.up(x)).relu() * self.scale)


def plain(kind: str) -> nn.Module:
    """As the user had it, on one process."""
    torch.manual_seed(0)
    up, gate = nn.Linear(D, INNER), nn.Linear(D, INNER, bias=False)
    down = nn.Linear(INNER, D)
    return (Block(up, gate, down) if kind == "block" else Wide(up, down)).to(FP64)


def parallel(kind: str, mesh: Mesh) -> nn.Module:
    """As the user has it now."""
    wide = kind == "wide"
    up = ColumnParallelLinear(D, INNER, mesh=mesh, gather_output=wide)
    gate = ColumnParallelLinear(D, INNER, bias=False, mesh=mesh)
    down = RowParallelLinear(INNER, D, mesh=mesh, input_is_parallel=not wide)
    return (Wide(up, down) if wide else Block(up, gate, down)).to(FP64)


def run(module: nn.Module) -> Measured:
    """Output and the gradient of the input."""
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 3, 5, D, generator=generator, dtype=FP64)
    x.requires_grad_()
    y = module(x)
    y.backward(dy)
    assert x.grad is not None
    return {"output": y.detach().numpy(), "input gradient": x.grad.numpy()}


@lru_cache
def reference(kind: str) -> tuple[Measured, dict[str, np.ndarray]]:
    """What the plain module gives, gradients included, and its weights."""
    module = plain(kind)
    found = run(module)
    weights = {name: p.detach().numpy() for name, p in module.named_parameters()}
    return found | {name: p.grad.numpy() for name, p in module.named_parameters() if p.grad is not None}, weights


def run_parallel(kind: str, tp: int, weights: dict[str, Any]) -> Measured:
    """On a rank."""
    module = parallel(kind, Mesh.create(tp=tp, device="cpu"))
    tpformer.load_full_state(module, {name: torch.from_numpy(x) for name, x in weights.items()})
    found = run(module)
    tpformer.reduce_partial_gradients(module)
    return found | {name: tpformer.full_gradient(module, name).numpy() for name, _ in module.named_parameters()}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", ["block", "wide"])
def test_changing_the_class_names_changes_no_result(kind: str, tp: int, ranks: Ranks) -> None:
    expected, weights = reference(kind)
    for found in ranks(run_parallel, tp, kind, tp, weights):
        assert mismatches(expected, found, TOLERANCE[FP64]) == []


def placements_under_sequence_parallelism() -> str:
    """On a rank: what is said to torch's own norm, whose gradient would be of this rank's tokens only."""
    mesh = Mesh.create(tp=2, sequence_parallel=True, device="cpu")
    with pytest.raises(ValueError, match="has no Placement") as error:
        tpformer.reduce_partial_gradients(parallel("block", mesh))
    return str(error.value)


def test_a_plain_parameter_is_refused_under_sequence_parallelism(ranks: Ranks) -> None:
    for message in ranks(placements_under_sequence_parallelism, 2):
        assert message.startswith("parameter norm.weight (LayerNorm)")


def test_a_state_that_does_not_fit_is_refused_whole() -> None:
    module = parallel("block", Mesh())
    state = plain("block").state_dict()
    before = {name: p.clone() for name, p in module.named_parameters()}
    state["extra"] = state.pop("gate.weight")
    state["up.weight"] = state["up.weight"].T
    text = r"missing gate.weight; unknown extra; up.weight has shape \(12, 24\), expected \(24, 12\)"
    with pytest.raises(ValueError, match=text):
        tpformer.load_full_state(module, state)
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())
