"""benchmarks/generation.py on the CPU: who generates the same tokens is timed, in one record."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import generation

TINY = generation.Options(
    hidden=32, layers=1, heads=2, kv_heads=1, ffn=40, vocab=64, prompt=6, new=3, batches=(1, 2), rounds=2
)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return generation.measure(TINY, torch.device("cpu"))


def test_everybody_at_every_batch_size(record: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    names = {"tpformer", "transformers", "transformers, static cache"}
    assert {(row["batch"], row["name"]) for row in record["results"]} == {(b, name) for b in (1, 2) for name in names}
    for row in record["results"]:
        assert len(row["samples_ms"]) == 2
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] * 3 / row["median_ms"])
    json.dumps(record)
    generation.print_table(record)
    assert "speed / transformers" in capsys.readouterr().out


def test_other_tokens_are_seen() -> None:
    contenders, _ = generation.build(replace(TINY, rounds=1), torch.device("cpu"))
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    contenders["another"] = lambda tokens: contenders["tpformer"](tokens).flip(0, 1)
    with pytest.raises(RuntimeError, match="another does not generate the tokens of tpformer"):
        generation.check(contenders, tokens)
