"""examples/parallelize_transformers.py prints one loss, whatever the number of processes."""

import contextlib
import io
import re

import pytest

from examples.parallelize_transformers import main
from tests.distributed import Ranks


def printed() -> str:
    """Here or on a rank."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main()
    return out.getvalue()


def losses(text: str) -> list[float]:
    """Of each step."""
    return [float(found) for found in re.findall(r"loss ([\d.]+)", text)]


def test_the_losses_do_not_depend_on_the_processes(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    alone = printed()
    first, second = ranks(printed, 2)
    assert second == ""
    assert len(losses(alone)) == 5
    assert losses(alone)[-1] < losses(alone)[0]
    assert losses(first) == pytest.approx(losses(alone), rel=1e-5)
    assert "all_gather  tp    forward   float32" in first
