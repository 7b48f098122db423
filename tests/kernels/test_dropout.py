"""dropout_add: whatever the seed and the place, the mask is bit for bit that of the global positions."""

import itertools

import pytest
import torch
from torch import Tensor

from tests.kernels.support import DEVICE, guarded, small_tables
from tpformer_kernels import dropout_add, random_columns

LARGEST = (1 << 32) - 1
SEEDS = [0, 1, LARGEST, 1 << 32, 1 << 63, (1 << 64) - 1, 0x0123456789ABCDEF]


def dropped(shape: tuple[int, int, int], p: float, place: tuple[int, int, int]) -> Tensor:
    """Where the kernel writes a 0."""
    with guarded():
        y = dropout_add(torch.ones(shape, device=DEVICE), None, p, place, backend="triton")
    assert ((y == 0) | (y == torch.tensor(1 / (1 - p)))).all()
    return (y == 0).cpu()


def words(shape: tuple[int, int, int], place: tuple[int, int, int]) -> Tensor:
    """The random words of the elements, one sample and one position at a time."""
    seed, sample, position = place

    def row(i: int, j: int) -> Tensor:
        where = torch.tensor(position + j), torch.tensor(sample + i), torch.tensor(0)
        return random_columns(seed, where, 0, shape[2])

    return torch.stack([torch.stack([row(i, j) for j in range(shape[1])]) for i in range(shape[0])])


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds(seed: int) -> None:
    place, shape = (seed, 3, 5), (2, 2, 9)
    assert torch.equal(dropped(shape, 0.5, place), words(shape, place) < 1 << 31)
    columns = random_columns(seed, (torch.tensor(5), torch.tensor(3), torch.tensor(0)), 0, 9)
    assert torch.equal(dropped(shape, 0.5, place)[0, 0], columns < 1 << 31)


@pytest.mark.parametrize("sample", [0, (1 << 31) - 2, 1 << 31, LARGEST - 1])
@pytest.mark.parametrize("position", [0, (1 << 31) - 2, LARGEST - 2])
def test_large_places(sample: int, position: int) -> None:
    place, shape = (7, sample, position), (2, 3, 5)
    assert torch.equal(dropped(shape, 0.4, place), words(shape, place) < round(0.4 * 2**32))


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 15, 16, 17, 31, 33])
def test_widths(columns: int) -> None:
    place, shape = (11, 1, 2), (1, 2, columns)
    expected = words(shape, place) < 1 << 31
    assert torch.equal(dropped(shape, 0.5, place), expected)
    with small_tables():
        assert torch.equal(dropped(shape, 0.5, place), expected)


def test_a_part_of_the_batch_draws_its_part_of_the_mask() -> None:
    seed, shape = (1 << 64) - 3, (4, 6, 13)
    whole = dropped(shape, 0.3, (seed, 100, 1000))
    for i, j in itertools.product((0, 1, 3), (0, 2, 5)):
        part = dropped((shape[0] - i, shape[1] - j, shape[2]), 0.3, (seed, 100 + i, 1000 + j))
        assert torch.equal(part, whole[i:, j:])


@pytest.mark.parametrize("p", [1e-12, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-6, 1 - 1e-12])
def test_probabilities(p: float) -> None:
    place, shape = (5, 0, 0), (1, 2, 33)
    with guarded():
        y = dropout_add(torch.ones(shape, device=DEVICE), None, p, place, backend="triton").cpu()
    expected = words(shape, place) < min(round(p * 2**32), LARGEST)
    assert torch.equal(y == 0, expected)
    torch.testing.assert_close(y[~expected], torch.full_like(y[~expected], 1 / (1 - p)), rtol=1e-6, atol=0)


def test_as_many_fall_as_torch_s_dropout_lets_fall_and_the_mean_stays() -> None:
    x = torch.ones(1, 8, 1000, device=DEVICE)
    ours = dropout_add(x, None, 0.3, (123, 0, 0), backend="triton")
    theirs = torch.nn.functional.dropout(x, 0.3)
    deviation = (0.3 * 0.7 / x.numel()) ** 0.5
    for y in (ours, theirs):
        assert abs((y == 0).float().mean().item() - 0.3) < 5 * deviation
        assert abs(y.mean().item() - 1) < 5 * deviation / 0.7
        torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / 0.7))


def test_seeds_positions_and_samples_draw_different_masks() -> None:
    shape = (1, 1, 64)
    masks = [dropped(shape, 0.5, place) for place in itertools.product((1, 2, 1 + (1 << 32)), (0, 1), (0, 1))]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_without_dropout_it_is_the_sum(backend: str, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 2, 3, 5, device=DEVICE).to(dtype)
    assert torch.equal(dropout_add(x, residual, 0.0, (1, 2, 3), backend=backend), x + residual)  # type: ignore[arg-type]
    assert torch.equal(dropout_add(x, None, 0.0, (1, 2, 3), backend=backend), x)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_what_falls_is_0_whatever_it_was(backend: str) -> None:
    for value in (torch.inf, torch.nan):
        y = dropout_add(torch.full((1, 2, 33), value, device=DEVICE), None, 0.5, (5, 0, 0), backend=backend)  # type: ignore[arg-type]
        assert torch.equal((y == 0).cpu(), words((1, 2, 33), (5, 0, 0)) < 1 << 31)
        assert not y[y != 0].isfinite().any()


def test_the_gradient_falls_where_the_output_fell() -> None:
    x = torch.ones(2, 3, 9, device=DEVICE, requires_grad=True)
    residual = torch.ones(2, 3, 9, device=DEVICE, requires_grad=True)
    y = dropout_add(x, residual, 0.5, (9, 8, 7), backend="triton")
    dx, dresidual = torch.autograd.grad(y, (x, residual), torch.ones_like(y))
    assert torch.equal(dx + 1, y)
    assert torch.equal(dresidual, torch.ones_like(y))
