"""What every test of the benchmarks may rely on."""

import pytest

from benchmarks import kernel_measure, matmul_contenders


@pytest.fixture(autouse=True)
def _few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the same bits two times are enough, where Triton is interpreted."""
    for module in (kernel_measure, matmul_contenders):
        monkeypatch.setattr(module, "REPEATS", 2)
