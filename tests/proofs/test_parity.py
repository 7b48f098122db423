"""The layout never changes the model: loss, logits and every parameter's gradient are those of one process.

tp 1, 2, 4 and tp x dp = 2 x 2, each with and without sequence parallelism; fp64 to 1e-10, fp32 to 1e-5 relative.
The gradient of replicas is their plain average over dp; the one of tensor-parallel ranks goes through
`reduce_partial_gradients` and `full_gradient`.
"""

from functools import lru_cache

import pytest
import torch

from tests.distributed import Ranks
from tests.proofs.cases import (
    RUNS,
    TOLERANCE,
    VARIANTS,
    Layout,
    Measured,
    build_random,
    measure,
    measure_model,
    mismatches,
)
from tpformer import Mesh


@lru_cache
def reference(variant: str, dtype: torch.dtype) -> Measured:
    """One process, without any process group."""
    return measure_model(build_random(VARIANTS[variant], Mesh(), dtype))


@pytest.mark.parametrize(("layout", "dtype"), RUNS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_logits_and_gradients_are_those_of_one_process(
    variant: str, layout: Layout, dtype: torch.dtype, ranks: Ranks
) -> None:
    for rank, found in enumerate(ranks(measure, layout.world_size, variant, layout, dtype)):
        assert mismatches(reference(variant, dtype), found, TOLERANCE[dtype]) == [], f"rank {rank}"
