"""The report of a measured step: every rank's spans arrive, its numbers are theirs, and a wait is seen as idle time."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import Ranks
from tpformer import Mesh, trace_communication
from tpformer.parallel.bubble import alike, disorder, schedule_order, simulate
from tpformer.parallel.timeline import KINDS, Span, Timeline, idle_seconds, idle_share
from tpformer.parallel_config import Schedule
from tpformer.planner.gantt import COLORS
from tpformer.train.timeline_report import MeasuredStep, draw, gather_spans, plot, table


def synthetic(schedule: Schedule, pp: int, micro_batches: int, slow: float = 1.0) -> MeasuredStep:
    """A step in milliseconds after the zero, with an optimizer; the last rank's stages are `slow` times as slow."""
    order = schedule_order(schedule, pp, micro_batches)
    last = {action.stage for action in order[-1]}
    ranks = simulate(order, lambda kind, stage: alike(kind, stage) * (slow if stage in last else 1.0))
    end = max(span.end for rank in ranks for span in rank)
    return MeasuredStep(
        schedule,
        micro_batches,
        [
            [span._replace(start=(5 + span.start) / 1e3, end=(5 + span.end) / 1e3) for span in rank]
            + [Span("optimizer", -1, -1, (6 + end) / 1e3, (8 + end) / 1e3)]
            for rank in ranks
        ],
    )


def made_up(rank: int) -> list[Span]:
    """As many spans as the rank's number, of values that only a bit-for-bit copy keeps."""
    return [Span(KINDS[(rank + n) % 5], rank - 1, 1000 * n - 1, 0.1 * rank + n, 1 / 3 + n) for n in range(rank)]


def gathered(tp: int, dp: int) -> tuple[list[list[Span]], list[tuple[str, str]]]:
    """On a rank: what arrives of `made_up`, and the collectives."""
    mesh = Mesh.create(tp=tp, pp=2, dp=dp, device="cpu")
    with trace_communication() as trace:
        found = gather_spans(made_up(mesh.world.rank), mesh)
    return found, [(call.op, call.axis) for call in trace.calls]


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 1), (1, 2)])
def test_the_spans_of_replica_0_arrive_on_every_rank(ranks: Ranks, tp: int, dp: int) -> None:
    """Rank 0 has none; two collectives, whatever the ranks hold."""
    replica = [0, tp * dp]  # world ranks of pp 0 and 1
    for found, calls in ranks(gathered, 2 * tp * dp, tp, dp):
        assert found == [made_up(rank) for rank in replica]
        assert [op for op, _ in calls] == ["all_gather"] * 2


def test_one_process_gathers_its_own() -> None:
    assert gather_spans(made_up(3), Mesh()) == [made_up(3)]


PART = 0.1


def two_stages(waits: bool, steps: int) -> list[list[Span]]:
    """On a rank: a stage that sleeps instead of computing, PART forward and 2 PART backward; 1 or 2 micro-batches.

    Rank 1 receives what rank 0 sends, and back; without `waits` it takes it when all is done.
    """
    mesh = Mesh.create(pp=2, device="cpu")
    rank, timeline, x, sent = mesh.pp.rank, Timeline(mesh.device), torch.zeros(4), []
    timeline.start(mesh.world)
    for number in range(steps):
        if rank == 1 and waits:
            dist.recv(x, 0)
        with timeline.span("forward", rank, number):
            time.sleep(PART)
        if rank == 0:
            sent.append(dist.isend(torch.zeros(4), 1))
    for number in range(steps):
        if rank == 0:
            dist.recv(x, 1)
        with timeline.span("backward", rank, number):
            time.sleep(2 * PART)
        if rank == 1:
            sent.append(dist.isend(torch.zeros(4), 0))
    for _ in range(steps if rank == 1 and not waits else 0):
        dist.recv(x, 0)
    for work in sent:
        assert work is not None
        work.wait()
    return gather_spans(timeline.spans(), mesh)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_wait_is_idle_time(ranks: Ranks, steps: int) -> None:
    """What a sleep does not shorten: rank 1 idles while rank 0 is in its first forward and in its last backward."""
    found, again = ranks(two_stages, 2, True, steps)
    assert found == again
    step = MeasuredStep("gpipe", steps, found)
    first, last = found[0][0], found[0][-1]
    idle = idle_seconds(found)
    assert idle[1] >= (first.end - first.start) + (last.end - last.start) >= 3 * PART
    assert idle[0] >= 3 * PART
    assert [span.start for span in found[1]] == sorted(span.start for span in found[1])
    assert disorder(found) < PART
    # a busy machine sleeps longer, in a span or between two; an unloaded one is within a per cent
    assert idle_share(found) == pytest.approx(step.theory, abs=0.15)
    assert step.theory == 1 / (steps + 1)
    assert f"idle {idle_share(found):.1%} measured, {step.theory:.1%} in theory" in table(step)


def test_a_stage_that_does_not_wait_is_seen(ranks: Ranks) -> None:
    """Negative control: rank 1 computes on what it has not received, and starts a sleep too early."""
    found = ranks(two_stages, 2, False, 1)[0]
    assert disorder(found) > PART / 2
    assert "the ranks' clocks differ: a span begins" in table(MeasuredStep("gpipe", 1, found))


def cells(text: str) -> list[list[str]]:
    """The columns of a table's lines of ranks."""
    return [line.split() for line in text.split("\n") if re.match(r" +\d+ +\d+ ", line)]


def test_the_table_by_hand() -> None:
    """Two stages, the second half as fast: rank 0 works 6 of 15 ms, rank 1 12 (see the bubble's tests)."""
    text = table(synthetic("gpipe", 2, 2, slow=2.0))
    assert cells(text) == [
        ["0", "0", "2.00", "4.00", "0.00", "2.00", "9.00", "40.0%", "60.0%"],
        ["1", "1", "4.00", "8.00", "0.00", "2.00", "3.00", "80.0%", "20.0%"],
    ]
    assert text.split("\n")[-2:] == [
        "gpipe, p = 2, m = 2: the pipeline's part of the step took 15.00 ms",
        "idle 40.0% measured, 33.3% in theory with stages all alike, 40.0% with stages as slow as these",
    ]


def test_the_table_of_several_stages_a_rank() -> None:
    """A line a stage; idle time and the optimizer are the rank's, and stand once."""
    assert cells(table(synthetic("zbv", 2, 3))) == [
        ["0", "0", "3.00", "3.00", "3.00", "2.00", "1.00", "47.4%", "5.3%"],
        ["0", "3", "3.00", "3.00", "3.00", "47.4%"],
        ["1", "1", "3.00", "3.00", "3.00", "2.00", "1.00", "47.4%", "5.3%"],
        ["1", "2", "3.00", "3.00", "3.00", "47.4%"],
    ]


def test_the_table_fits_a_terminal() -> None:
    step = synthetic("interleaved_zero_bubble", 12, 24)
    hours = [
        [span._replace(start=3600 + 1e6 * span.start, end=3600 + 1e6 * span.end) for span in r] for r in step.ranks
    ]
    text = table(MeasuredStep(step.schedule, 24, hours))
    assert max(map(len, text.split("\n"))) <= 100
    assert len(cells(text)) == 24


@pytest.mark.parametrize("schedule", ["gpipe", "dualpipev"])
def test_stages_as_slow_as_these_explain_the_idle_time(schedule: Schedule) -> None:
    """Where nothing but the stages' own times cost, the third number is the measured one."""
    step = synthetic(schedule, 3, 9, slow=1.7)
    assert step.theory_of_these_stages == pytest.approx(idle_share(step.ranks), rel=1e-9)
    assert step.theory_of_these_stages > step.theory + 0.05


def changed(ranks: Any, rank: int, spans: list[Span]) -> list[list[Span]]:
    """The ranks with another one's spans."""
    return [spans if number == rank else list(old) for number, old in enumerate(ranks)]


def test_another_schedules_work_is_refused() -> None:
    """Negative control: a rank in another order, with work missing or too much, or of another kind."""
    ranks = synthetic("1f1b", 2, 4).ranks
    with pytest.raises(ValueError, match="rank 0 did the backward of micro-batch 0 on stage 0 where gpipe has the for"):
        MeasuredStep("gpipe", 4, ranks)
    first, *rest = ranks[1]
    with pytest.raises(ValueError, match="rank 1 did the backward of micro-batch 0"):
        MeasuredStep("1f1b", 4, changed(ranks, 1, rest))
    with pytest.raises(ValueError, match="rank 1 did nothing where 1f1b has the forward of micro-batch 4 on stage 1"):
        MeasuredStep("1f1b", 5, changed(synthetic("1f1b", 2, 5).ranks, 1, list(ranks[1])))
    more = [*ranks[1], first._replace(start=1.0, end=2.0)]
    with pytest.raises(ValueError, match="rank 1 did the forward of micro-batch 0 on stage 1 where 1f1b has nothing"):
        MeasuredStep("1f1b", 4, changed(ranks, 1, more))
    with pytest.raises(ValueError, match="rank 1 did the input gradient"):
        MeasuredStep("1f1b", 4, changed(ranks, 1, [first._replace(kind="input gradient"), *rest]))


def test_a_forward_and_its_loss_may_be_two_spans() -> None:
    """They count together, also in the mean time of the stage."""
    step = synthetic("gpipe", 2, 2, slow=2.0)
    halves = []
    for span in step.ranks[1]:
        middle = (span.start + span.end) / 2
        halves += [span._replace(end=middle), span._replace(start=middle)] if span.kind == "forward" else [span]
    assert table(MeasuredStep("gpipe", 2, changed(step.ranks, 1, halves))) == table(step)


@pytest.mark.parametrize("show", [table, lambda step: draw([step])])
def test_overlapping_spans_are_refused(show: Any) -> None:
    """Negative control: a rank's time must not count twice."""
    step = synthetic("gpipe", 2, 2)
    first, second, *rest = step.ranks[0]
    late = [first._replace(end=second.start + 1e-4), second, *rest]
    with pytest.raises(ValueError, match=r"rank 0: forward of micro-batch 1 .* begins before forward of micro"):
        show(MeasuredStep("gpipe", 2, changed(step.ranks, 0, late)))


def test_the_picture_shows_every_span() -> None:
    """A panel a step on one scale; each bar where its span is, in its kind's colour, with its micro-batch inside."""
    from matplotlib.colors import same_color

    steps = [synthetic("gpipe", 3, m) for m in (1, 3, 9)]
    panels = draw(steps).axes
    assert len(panels) == 3
    assert len({panel.get_xlim() for panel in panels}) == 1
    for panel, step in zip(panels, steps, strict=True):
        spans = [(row, span) for row, rank in enumerate(step.ranks) for span in rank]
        assert len(panel.patches) == len(spans)
        for bar, (row, span) in zip(panel.patches, spans, strict=True):
            assert bar.get_y() + bar.get_height() / 2 == pytest.approx(row)
            assert bar.get_x() == pytest.approx(span.start * 1e3 - 5)  # the first span begins the picture
            assert bar.get_width() == pytest.approx((span.end - span.start) * 1e3)
            assert same_color(bar.get_facecolor(), COLORS[span.kind])
        assert [text.get_text() for text in panel.texts] == [str(s.micro_batch) for _, s in spans if s.micro_batch >= 0]
        assert [label.get_text() for label in panel.get_yticklabels()] == ["rank 0", "rank 1", "rank 2"]
        m = step.micro_batches
        share = f"{2 / (m + 2):.1%}"
        assert panel.get_title() == f"gpipe, p = 3, m = {m}: idle {share} measured, {share} in theory"


def test_the_later_stages_of_a_rank_are_paler() -> None:
    figure = draw([synthetic("zbv", 2, 4)])
    (panel,) = figure.axes
    ranks = synthetic("zbv", 2, 4).ranks
    shades = {(span.stage, bar.get_alpha()) for bar, span in zip(panel.patches, [*ranks[0], *ranks[1]], strict=True)}
    assert shades == {(0, 1.0), (3, 0.725), (1, 1.0), (2, 0.725), (-1, 1.0)}
    (legend,) = figure.legends
    kinds = ["forward", "input gradient", "weight gradient", "optimizer"]
    assert [text.get_text() for text in legend.get_texts()] == [*kinds, "paler: the rank's later stages"]


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    plot(path, [synthetic("interleaved_1f1b", 2, 4), synthetic("gpipe", 2, 1)])
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG\r\n\x1a\n")
    assert first.endswith(b"IEND\xaeB`\x82")
    plot(path, [synthetic("interleaved_1f1b", 2, 4, slow=2.0), synthetic("gpipe", 2, 1)])
    assert path.read_bytes() != first
    assert [p.name for p in tmp_path.iterdir()] == ["timeline.png"]


def test_no_step_has_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 steps"):
        plot(tmp_path / "timeline.png", [])
