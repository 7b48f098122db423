"""What every test may ask for."""

from collections.abc import Iterator

import pytest
import torch

from tests.distributed import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Run a function on several processes: `ranks(fn, world_size, *args)`."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The reference computes as the ranks do, with one thread."""
    torch.set_num_threads(1)
