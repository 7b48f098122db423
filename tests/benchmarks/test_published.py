"""The published tables were typed right: what each row says twice agrees with itself."""

from dataclasses import replace

import pytest

from benchmarks.published import rows
from benchmarks.published_row import Published
from tpformer.models.gpt import GPTConfig
from tpformer.planner.candidate import Candidate
from tpformer.planner.hardware import device, link

ROWS = rows()
COUNTS = {
    "2019": 8 + 3,
    "2020": 12,
    "SC21": 10,
    "SC21 table 2": 6,
    "SC21 ZeRO-3": 6,
    "2022 full": 4,
    "2022 present": 5,
    "H100": 9,
    "torchtitan 2024": 4,
    "torchtitan 2025": 4,
    "torchtitan 2026": 1,
}
GPUS = {"H100": (48, 96, 192, 384, 768, 1536, 2304, 3072, 6144), "2022 full": (8, 64, 280, 512)}


def label(row: Published) -> str:
    return f"{row.table} {row.name}"


def complaints(row: Published) -> list[str]:
    """What a row says that does not fit what else it says."""
    found = []
    count = row.model.num_parameters()
    if row.table == "H100" and isinstance(row.model, GPTConfig):  # rotary positions
        count -= row.model.max_seq_len * row.model.hidden_size
    digit = 0.05e9 if row.parameters < 10e9 else 0  # 1.7B has two digits
    if abs(count - row.parameters) > max(0.02 * row.parameters, digit):
        found.append("parameters")
    rate = row.flops / row.step_seconds / row.gpus
    if row.tflops is not None and rate != pytest.approx(row.tflops * 1e12, rel=0.02):
        found.append("TFLOP/s")
    peak = device(row.device).peak(row.parallel.precision)
    if row.mfu is not None and rate != pytest.approx(row.mfu * peak, rel=0.02):
        found.append("MFU")
    if row.petaflops is not None and rate * row.gpus != pytest.approx(row.petaflops * 1e15, rel=0.02):
        found.append("PFLOP/s")
    if not 0.1 < rate / peak < 0.65:
        found.append("rate")
    return found


def test_every_row_is_there_once() -> None:
    assert {table: sum(row.table == table for row in ROWS) for table in COUNTS} == COUNTS
    assert len(ROWS) == sum(COUNTS.values())
    assert len({label(row) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_a_row_agrees_with_itself(row: Published) -> None:
    assert complaints(row) == []


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_a_row_is_a_layout_that_can_run(row: Published) -> None:
    assert device(row.device).peak(row.parallel.precision) > 0
    assert link(row.network).name == row.network
    Candidate(row.model, row.parallel, row.seq_len, row.batch_size, row.micro_batch_size or 1)


@pytest.mark.parametrize("table", GPUS)
def test_gpus_are_the_published(table: str) -> None:
    assert tuple(row.gpus for row in ROWS if row.table == table) == GPUS[table]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("2020", "TFLOP/s"),
        ("SC21", "PFLOP/s"),
        ("2022 present", "MFU"),
        ("H100", "PFLOP/s"),
        ("torchtitan 2026", "TFLOP/s"),
    ],
)
def test_mistyped_rows_are_seen(table: str, expected: str) -> None:
    """Negative control: another width, depth, batch, replicas or time breaks an agreement."""
    for row in (row for row in ROWS if row.table == table):
        slower = replace(
            row,
            seconds=row.seconds and row.seconds * 1.05,
            tflops=row.tflops and (row.tflops if row.seconds or row.tokens else row.tflops * 1.05),
            tokens=row.tokens and row.tokens * 1.05,
        )
        assert expected in complaints(slower)
        model = replace(row.model, num_layers=round(row.model.num_layers * 1.1))
        assert "parameters" in complaints(replace(row, model=model))
        assert complaints(replace(row, model=replace(row.model, hidden_size=row.model.hidden_size * 2)))


@pytest.mark.parametrize(("name", "hfu"), [("22B", 0.437), ("175B", 0.528), ("530B", 0.570), ("1000B", 0.570)])
def test_the_erratum_is_in_the_published_hardware_flops(name: str, hfu: float) -> None:
    """72BLsh²(1 + s/3h + v/12hL), as printed, gives the printed HFU; with the 2s/9h that is meant it is less."""
    row = next(row for row in ROWS if row.table == "2022 present" and row.name.startswith(name))
    s, h, layers = row.seq_len, row.model.hidden_size, row.model.num_layers

    def utilization(attention: float) -> float:
        per_token = 72 * layers * h * h * (1 + attention + row.model.vocab_size / (12 * h * layers))
        return row.batch_size * s * per_token / row.step_seconds / row.gpus / 312e12

    assert utilization(s / (3 * h)) == pytest.approx(hfu, rel=0.006)
    assert utilization(2 * s / (9 * h)) < utilization(s / (3 * h))
