"""Where a linear layer leaves its weight's gradient, if somebody sums it over the micro-batches of a step."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from tpformer_kernels import Backend, accumulate_


class GradientSum:
    """The gradient of one weight, in fp32 at least, summed over the uses and the micro-batches of a step.

    Matmuls add to it as they go: no gradient in the weight's own dtype is written, rounded or added afterwards.
    """

    def __init__(self, total: Tensor):
        self.total = total
        self.empty, self.closed = True, False
        """Holds nothing of this step yet; takes nothing more in this step."""
        self.waiting: list[Callable[[], None]] | None = None
        """Where products are put to be multiplied later; None: at once."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """None, in a copy of a model: nobody would read what its layers add there."""
        return type(None), ()

    def restart(self) -> None:
        """The step is over: the next gradient replaces what is here."""
        self.empty, self.closed = True, False

    def add(self, gradient: Tensor) -> None:
        """Add a gradient that autograd computed. Raises RuntimeError if the sum has been sent off."""
        self._check_open()
        if self.empty:
            self.total.copy_(gradient)
        else:
            self.total.add_(gradient)
        self.empty = False

    def add_products(self, dys: Sequence[Tensor], x: Tensor, backend: Backend) -> None:
        """Add dyᵀ x (see write_products), of one use. Raises RuntimeError if the sum has been sent off."""
        if self.waiting is not None:
            self.waiting.append(partial(self._add_products, dys, x, backend))
        else:
            self._add_products(dys, x, backend)

    def _add_products(self, dys: Sequence[Tensor], x: Tensor, backend: Backend) -> None:
        self._check_open()
        write_products(self.total, dys, x, self.empty, backend)
        self.empty = False

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError(
                "a gradient came after its sum had been sent to the other ranks: was backward run twice, or in parts?"
            )


def write_products(total: Tensor, dys: Sequence[Tensor], x: Tensor, first: bool, backend: Backend) -> Tensor:
    """total (f, d) += dyᵀ x, or = if it is the first; dys: interleaved outputs (n, f/len(dys)), x (n, d)."""
    for dy, part in zip(dys, total.unflatten(0, (-1, len(dys))).unbind(1), strict=True):
        accumulate_(part, dy, x, first, backend=backend)
    return total


def gradient_sum(weight: nn.Parameter) -> GradientSum | None:
    """Where this weight's gradient is summed; None: autograd takes it."""
    return getattr(weight, "gradient_sum", None)


def set_gradient_sum(weight: nn.Parameter, total: GradientSum | None) -> None:
    """Have the gradient of a linear layer's weight summed there, from its next forward on."""
    vars(weight)["gradient_sum"] = total
