"""The two kinds of feed-forward block, their inner features split over tp."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpformer.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpformer.mesh import Mesh, divide
from tpformer_kernels import GATES, Backend, bias_gelu, gated_activation, gated_product, use_triton

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
FEW = 16
"""Tokens up to which, without a gradient, one product costs less than two that leave gate and up apart."""


class MLP(nn.Module):
    """act(x W_upᵀ + b) W_downᵀ + b; x[B, S, D] · W_up[D, F_tp] -> act -> · W_down[F_tp, D] -> y[B, S, D].

    activation: gelu (erf), gelu_tanh or relu. Raises ValueError for another, or for a width that tp does not divide.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        activation: str = "gelu",
        bias: bool = True,
        *,
        mesh: Mesh = Mesh(),
        backend: Backend = "auto",
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation ({activation!r}) must be one of {', '.join(ACTIVATIONS)}")
        divide(ffn_hidden_size, mesh.tp.size, "ffn_hidden_size")
        self.activation, self.backend = activation, backend
        self.up = ColumnParallelLinear(hidden_size, ffn_hidden_size, bias, mesh=mesh, backend=backend)
        self.down = RowParallelLinear(ffn_hidden_size, hidden_size, bias, mesh=mesh, backend=backend)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(b, s, d) -> (b, s, d), or (b, s/tp, d) both under sequence parallelism; plus a residual of that shape."""
        # the bias costs no pass of its own, nor does its sum; whoever replaced `up` is asked for all of it
        if self.activation != "relu" and use_triton(self.backend, x) and is_plain(self.up, ColumnParallelLinear):
            if self.up.fuses(x):
                hidden, result = self.up(x, activation=self.activation)  # each (b, s, f/tp)
                hidden = bias_gelu(hidden, None, self.activation, computed=result, backend="triton")
                return project(self.down, hidden, residual)
            hidden = self.up(x, add_bias=False)  # (b, s, f/tp)
            return project(self.down, bias_gelu(hidden, self.up.bias, self.activation, backend=self.backend), residual)
        hidden = self.up(x)  # (b, s, f/tp)
        if self.activation == "relu":
            return project(self.down, F.relu(hidden), residual)
        hidden = F.gelu(hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return project(self.down, hidden, residual)


class GatedMLP(nn.Module):
    """(act(x W_gateᵀ) · x W_upᵀ) W_downᵀ, SwiGLU or GeGLU (arXiv 2002.05202); x[B, S, D] -> y[B, S, D].

    The weight of gate and up is one, row 2i the gate and row 2i + 1 the up of feature i: any tp splits it right.
    activation: silu, gelu (erf) or gelu_tanh. Raises ValueError for another, or for a width that tp does not divide.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        activation: str = "silu",
        bias: bool = False,
        *,
        mesh: Mesh = Mesh(),
        backend: Backend = "auto",
    ):
        super().__init__()
        if activation not in GATES:
            raise ValueError(f"activation ({activation!r}) must be one of {', '.join(GATES)}")
        divide(ffn_hidden_size, mesh.tp.size, "ffn_hidden_size")
        self.activation, self.backend = activation, backend
        self.gate_up = ColumnParallelLinear(
            hidden_size, 2 * ffn_hidden_size, bias, mesh=mesh, interleave=2, backend=backend
        )
        self.down = RowParallelLinear(ffn_hidden_size, hidden_size, bias, mesh=mesh, backend=backend)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(b, s, d) -> (b, s, d), or (b, s/tp, d) both under sequence parallelism; plus a residual of that shape."""
        strided = x.device.type == "cpu" and not use_triton(self.backend, x) and not torch.compiler.is_compiling()
        strided = strided and (torch.is_grad_enabled() or x.shape[:-1].numel() > FEW)
        plain = is_plain(self.gate_up, ColumnParallelLinear)
        if strided and plain:
            gate, up = self.gate_up(x, apart=True)  # each (b, s, f/tp): torch's CPU ops are slow on every other number
            return project(self.down, gated_product(gate, up, self.activation), residual)
        if plain and self.gate_up.fuses(x):
            gate_up, result = self.gate_up(x, activation=self.activation)  # (b, s, 2 f/tp) and (b, s, f/tp)
            hidden = gated_activation(gate_up, self.activation, computed=result, backend="triton")
            return project(self.down, hidden, residual)
        # one matmul, in whose output a kernel, Triton's or the compiler's, reads gate and up side by side
        return project(self.down, gated_activation(self.gate_up(x), self.activation, backend=self.backend), residual)


def project(down: nn.Module, hidden: Tensor, residual: Tensor | None) -> Tensor:
    """down(hidden) + residual; whoever replaced `down`, or looks at its output, is asked for the projection only."""
    if residual is None:
        return down(hidden)
    if is_plain(down, RowParallelLinear):
        return down(hidden, residual)
    return down(hidden) + residual


def is_plain(projection: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether nobody replaced a projection, or looks at its output, so that it may return more or less than that."""
    return type(projection) is kind and not projection._forward_hooks
