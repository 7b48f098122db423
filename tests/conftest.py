"""What every test may ask for."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.distributed import Ranks
from tests.interpreter import quick

# Triton reads it when it is imported, here and in the workers: on a GPU the kernels' tests run them as they are
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """--write-table: the README's table of compositions is written, and not only checked."""
    parser.addoption("--write-table", action="store_true", help="write the table of compositions into the README")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Run a function on several processes: `ranks(fn, world_size, *args)`."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    """Here as on the ranks."""
    with quick():
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The reference computes as the ranks do, with one thread."""
    torch.set_num_threads(1)
