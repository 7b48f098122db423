"""What every test of the kernels may rely on."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Random inputs are the same in every run, whichever tests run."""
    torch.manual_seed(0)
