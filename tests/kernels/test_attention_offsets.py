"""Attention's offsets past 2^31 numbers: queries, keys, values and gradients whose rows lie that far apart."""

import pytest
import torch
from torch import Tensor

from tests.kernels.attention_cases import CAUSAL, EVERYTHING, Shape, exact, expected, ours
from tests.kernels.support import TOLERANCE, assert_near, evaluate
from tests.kernels.test_offsets import HALF, far, memory, places  # noqa: F401 (a fixture)
from tests.kernels.test_offsets import pytestmark as pytestmark
from tpformer_kernels import AttentionOptions

SHAPE = Shape(2, 2, 2, 5, 5)


@pytest.mark.parametrize("options", [CAUSAL, EVERYTHING], ids=["causal", "everything"])
@pytest.mark.parametrize("which", ["q", "k", "v", "gradient"])
def test_rows_far_apart(memory: Tensor, which: str, options: AttentionOptions) -> None:  # noqa: F811
    inputs = SHAPE.inputs(HALF)
    moved, dys = list(inputs), [torch.randn_like(y) for y in ours(options)(*inputs)]
    index = ("q", "k", "v", "gradient").index(which)
    x = dys[0] if which == "gradient" else inputs[index]
    assert places(x) == [0, 1, 2]
    for dim in places(x):
        if which == "gradient":
            dys[0] = far(memory, x, dim)
        else:
            moved[index] = far(memory, x, dim)
        result = evaluate(ours(options), moved, 3, dys)
        assert_near(result, exact(expected(SHAPE, options), inputs, result), TOLERANCE[HALF])
