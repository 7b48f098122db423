"""Every op as a case: its inputs for a number of rows and columns, the op, and the same in torch's own ops."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tpformer_kernels as ops
from tests.kernels.support import DEVICE
from tpformer_kernels import ELSEWHERE, IGNORED

EPS, P, PLACE = 1e-5, 0.3, ((1 << 63) + 12345, 7, 1000)
SOFTCAP, SCALE = 5.0, 0.7


@dataclass(frozen=True)
class Case:
    """ours(*inputs, backend=) and torchs(*inputs) compute the same, of make(rows, columns) in fp64."""

    make: Callable[[int, int], tuple[Tensor, ...]]
    ours: Callable[..., Any]
    torchs: Callable[..., Any]
    trained: int
    """As many of the first inputs have gradients."""

    def inputs(self, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Random inputs of a dtype on the device."""
        made = self.make(rows, columns)
        return tuple(x.to(DEVICE, dtype if x.is_floating_point() else x.dtype) for x in made)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pair (x[i], x[i + k/2]) as one complex number, times cos + i·sin."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def apart(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """split_and_rotate in torch's own ops."""
    q, k, v = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
    return rotated(q, cos, sin), rotated(k, cos, sin), v


def angles(length: int, half: int) -> tuple[Tensor, Tensor]:
    """A table of arbitrary angles."""
    angle = 7 * noise(length, 1, half)
    return angle.cos(), angle.sin()


def dropped(x: Tensor, residual: Tensor | None = None) -> Tensor:
    """dropout_add in torch's own ops, by the mask that the reference draws."""
    kept = ops.dropout_add(torch.ones_like(x, dtype=torch.float64), None, P, PLACE, backend="torch") != 0
    y = torch.where(kept, x / (1 - P), 0.0)
    return y if residual is None else y + residual


def slice_of_logits(rows: int, columns: int) -> tuple[Tensor, ...]:
    """Logits and targets: columns of the slice, in turn with targets elsewhere and ignored."""
    targets = torch.randint(columns, (rows,))
    targets[1::3], targets[2::3] = ELSEWHERE, IGNORED
    return 3 * noise(rows, columns), targets


def slice_and_weights(rows: int, columns: int) -> tuple[Tensor, ...]:
    logits, targets = slice_of_logits(rows, columns)
    return logits, targets, logits.logsumexp(-1) + torch.rand(rows).double(), *noise(3, rows).unbind()


def capped(x: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(x / softcap) if softcap else x


def statistics(logits: Tensor, targets: Tensor, *, softcap: float = 0.0) -> Tensor:
    """cross_entropy_statistics, with the sum, in torch's own ops."""
    x = capped(logits, softcap)
    top = x.amax(-1)
    picked = x.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1).where(targets >= 0, 0.0)
    stats = torch.stack([top, (x - top.unsqueeze(1)).exp().sum(-1), picked, x.sum(-1)], dim=1)
    ignored = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=x.dtype, device=x.device)
    return stats.where((targets != IGNORED).unsqueeze(1), ignored)


def gradient(logits: Tensor, targets: Tensor, lse: Tensor, *abc: Tensor, softcap: float = 0.0) -> Tensor:
    """cross_entropy_gradient in torch's own ops."""
    x = capped(logits, softcap)
    a, b, c = (w.unsqueeze(1) for w in abc)
    onehot = torch.arange(x.shape[1], device=x.device) == targets.unsqueeze(1)
    y = a * (x - lse.unsqueeze(1)).exp() - c - b * onehot
    if softcap:
        y = y * (1 - (x / softcap).square())
    return y.where((targets != IGNORED).unsqueeze(1), 0.0)


def our_statistics(logits: Tensor, targets: Tensor, *, backend: ops.Backend, **options: Any) -> Tensor:
    return ops.cross_entropy_statistics(logits, targets, logits.shape[1], True, backend=backend, **options)


def our_gradient(logits: Tensor, targets: Tensor, lse: Tensor, *abc: Tensor, **options: Any) -> Tensor:
    a, b, c = abc
    return ops.cross_entropy_gradient(logits, targets, logits.shape[1], lse, (a, b, c), **options)


def our_norm(x: Tensor, *parameters: Tensor, op: Callable[..., Any], backend: ops.Backend) -> Any:
    return op(x, *parameters, EPS, backend=backend)


def torchs_rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def torchs_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def gated_by(name: str, act: Callable[[Tensor], Tensor]) -> Case:
    return Case(
        lambda n, d: (noise(n, 2 * d),),
        partial(ops.gated_activation, activation=name),
        lambda x: act(x[..., 0::2]) * x[..., 1::2],
        1,
    )


def gelu_of(name: str, tanh: str) -> dict[str, Case]:
    """bias_gelu with and without its bias."""
    with_bias = Case(
        lambda n, d: (noise(n, d), noise(d)),
        partial(ops.bias_gelu, activation=name),
        lambda x, bias: F.gelu(x + bias, approximate=tanh),
        2,
    )
    without = Case(
        lambda n, d: (noise(n, d),),
        partial(ops.bias_gelu, bias=None, activation=name),
        lambda x: F.gelu(x, approximate=tanh),
        1,
    )
    return {f"bias_gelu {name}": with_bias, f"bias_gelu {name}, no bias": without}


def softmaxed(x: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Exponentials over their sum, and 0 for a row that sees nothing."""
    n, d = x.shape[-2:]
    seen = torch.ones(n, d, dtype=torch.bool, device=x.device)
    seen = seen.tril(d - n) if causal else seen
    if mask is not None:
        seen = seen & mask if mask.dtype == torch.bool else seen & (mask > -torch.inf)
        x = x if mask.dtype == torch.bool else x + mask.clamp(min=-1e4) / SCALE
    exponentials = (SCALE * x).exp() * seen
    total = exponentials.sum(-1, keepdim=True)
    return exponentials / (total + (total == 0))


def scores_and_mask(n: int, d: int, boolean: bool) -> tuple[Tensor, Tensor]:
    """Scores of 2 x 3 heads, and a mask that the heads share; the first row sees nothing."""
    seen = torch.rand(2, 1, n, d) < 0.7
    seen[:, :, :1] = False
    return noise(2, 3, n, d), seen if boolean else noise(2, 1, n, d).masked_fill(~seen, -torch.inf)


def softmax_of(**options: Any) -> Callable[..., Tensor]:
    """softmax with the mask, if there is one, as an input."""

    def ours(x: Tensor, mask: Tensor | None = None, *, backend: ops.Backend) -> Tensor:
        return ops.softmax(x, scale=SCALE, mask=mask, backend=backend, **options)

    return ours


CASES: dict[str, Case] = {
    "softmax": Case(lambda n, d: (noise(n, d),), softmax_of(), softmaxed, 1),
    "softmax, causal": Case(
        lambda n, d: (noise(3, n, d),), softmax_of(causal=True), partial(softmaxed, causal=True), 1
    ),
    "softmax, seen": Case(partial(scores_and_mask, boolean=True), softmax_of(), softmaxed, 1),
    "softmax, added": Case(
        partial(scores_and_mask, boolean=False), softmax_of(causal=True), partial(softmaxed, causal=True), 1
    ),
    "rms_norm": Case(lambda n, d: (noise(n, d), noise(d)), partial(our_norm, op=ops.rms_norm), torchs_rms, 2),
    "add_rms_norm": Case(
        lambda n, d: (noise(n, d), noise(n, d), noise(d)),
        partial(our_norm, op=ops.add_rms_norm),
        lambda x, residual, weight: (torchs_rms(x + residual, weight), x + residual),
        3,
    ),
    "layer_norm": Case(
        lambda n, d: (noise(n, d), noise(d), noise(d)), partial(our_norm, op=ops.layer_norm), torchs_layer, 3
    ),
    "add_layer_norm": Case(
        lambda n, d: (noise(n, d), noise(n, d), noise(d), noise(d)),
        partial(our_norm, op=ops.add_layer_norm),
        lambda x, residual, weight, bias: (torchs_layer(x + residual, weight, bias), x + residual),
        4,
    ),
    "split_and_rotate": Case(lambda n, d: (noise(2, n, 2, 5, 2 * d), *angles(n, d)), ops.split_and_rotate, apart, 1),
    "apply_rope": Case(
        lambda n, d: (noise(2, n, 6, 2 * d), noise(2, n, 3, 2 * d), *angles(n, d)),
        ops.apply_rope,
        lambda q, k, cos, sin: (rotated(q, cos, sin), rotated(k, cos, sin)),
        2,
    ),
    "gated silu": gated_by("silu", F.silu),
    "gated gelu": gated_by("gelu", F.gelu),
    "gated gelu_tanh": gated_by("gelu_tanh", partial(F.gelu, approximate="tanh")),
    **gelu_of("gelu", "none"),
    **gelu_of("gelu_tanh", "tanh"),
    "dropout_add": Case(
        lambda n, d: (noise(2, n, d), noise(2, n, d)), partial(ops.dropout_add, p=P, place=PLACE), dropped, 2
    ),
    "dropout": Case(
        lambda n, d: (noise(2, n, d),), partial(ops.dropout_add, residual=None, p=P, place=PLACE), dropped, 1
    ),
    "cross_entropy_statistics": Case(slice_of_logits, our_statistics, statistics, 0),
    "cross_entropy_statistics, capped": Case(
        slice_of_logits, partial(our_statistics, softcap=SOFTCAP), partial(statistics, softcap=SOFTCAP), 0
    ),
    "cross_entropy_gradient": Case(slice_and_weights, our_gradient, gradient, 0),
    "cross_entropy_gradient, capped": Case(
        slice_and_weights, partial(our_gradient, softcap=SOFTCAP), partial(gradient, softcap=SOFTCAP), 0
    ),
}
TRAINED = {name: case for name, case in CASES.items() if case.trained}
