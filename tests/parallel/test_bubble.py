"""The bubble of each schedule is the textbooks', and its order is the one that torch runs."""

from dataclasses import dataclass, field
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining.schedules import Schedule1F1B, get_schedule_class

from tpformer.parallel.bubble import Action, Order, disorder, schedule_order, simulate, theoretical_bubble
from tpformer.parallel.split import stages_of
from tpformer.parallel.timeline import Kind, Span, idle_seconds, idle_share
from tpformer.parallel_config import V_SHAPED, ZERO_BUBBLE, ParallelConfig, Schedule

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
LETTERS: dict[str, Kind] = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
TORCH = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved1F1B",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_one_stage_a_rank_idles_as_in_the_textbook(schedule: Schedule, pp: int) -> None:
    """(p-1)/(m+p-1) to the last bit, of every rank alike."""
    for m in (pp, pp + 1, 2 * pp, 9, 32):
        assert theoretical_bubble(schedule, pp, m) == (pp - 1) / (m + pp - 1)
        assert idle_seconds(simulate(schedule_order(schedule, pp, m))) == [3 * (pp - 1)] * pp


@pytest.mark.parametrize("pp", [2, 3, 5])
def test_gpipe_runs_fewer_micro_batches_than_stages(pp: int) -> None:
    """With one micro-batch it is plain layer-wise parallelism: all but one rank idle."""
    for m in range(1, pp):
        assert theoretical_bubble("gpipe", pp, m) == (pp - 1) / (m + pp - 1)
    assert theoretical_bubble("gpipe", pp, 1) == (pp - 1) / pp


@pytest.mark.parametrize("pp", [2, 3, 4])
def test_several_stages_a_rank_idle_less(pp: int) -> None:
    """In units of a stage's forward: a rank works 3vm; interleaving leaves 3(p-1) of idleness, zero bubble p-1."""
    for m in (2 * pp, 4 * pp):
        for v in (2, 3):
            assert theoretical_bubble("interleaved_1f1b", pp, m, v) == (pp - 1) / (v * m + pp - 1)
            assert theoretical_bubble("interleaved_zero_bubble", pp, m, v) == (pp - 1) / (3 * v * m + pp - 1)
        for schedule in V_SHAPED:
            assert theoretical_bubble(schedule, pp, m) == (pp - 1) / (3 * 2 * m + pp - 1)  # type: ignore[arg-type]
        for schedule in SCHEDULES[2:]:
            assert theoretical_bubble(schedule, pp, m) < theoretical_bubble("1f1b", pp, m)


BY_HAND: dict[Schedule, tuple[list[str], float]] = {  # two ranks: action@start, and the idle share
    "gpipe": (["0F0@0 0F1@1 0B0@5 0B1@7", "1F0@1 1F1@2 1B0@3 1B1@5"], 3 / 9),
    "1f1b": (["0F0@0 0F1@1 0B0@4 0B1@7", "1F0@1 1B0@2 1F1@4 1B1@5"], 3 / 9),
    "interleaved_1f1b": (
        ["0F0@0 0F1@1 2F0@2 2F1@3 2B0@6 2B1@9 0B0@11 0B1@13", "1F0@1 1F1@2 3F0@3 3B0@4 3F1@6 3B1@7 1B0@9 1B1@11"],
        3 / 15,
    ),
    "interleaved_zero_bubble": (
        [
            "0F0@0 0F1@1 2F0@2 2F1@3 2I0@5 2W0@6 2I1@7 2W1@8 0I0@9 0W0@10 0I1@11 0W1@12",
            "1F0@1 1F1@2 3F0@3 3I0@4 3F1@5 3I1@6 3W0@7 1I0@8 3W1@9 1I1@10 1W0@11 1W1@12",
        ],
        1 / 13,
    ),
    "zbv": (
        [
            "0F0@0 0F1@1 3F0@3 3I0@4 3W0@5 3F1@6 3I1@7 3W1@8 0I0@9 0W0@10 0I1@12 0W1@13",
            "1F0@1 2F0@2 1F1@3 2F1@4 2I0@5 2W0@6 1I0@7 1W0@8 2I1@9 2W1@10 1I1@11 1W1@12",
        ],
        2 / 14,
    ),
    "dualpipev": (
        [
            "0F0@0 0F1@1 0F2@2 3F0@3 3I0@4 3W0@5 3F1@6 0F3@7 3B1@8 3F2@10 0B0@11 3B2@13 3F3@15 0B1@17 3B3@19 0I2@21 "
            "0W2@22 0I3@23 0W3@24",
            "1F0@1 2F0@2 1F1@3 2F1@4 1F2@5 2B0@6 2F2@8 1B0@9 1F3@11 2B1@12 2F3@14 1B1@15 2B2@17 1B2@19 2I3@21 1I3@22 "
            "2W3@23 1W3@24",
        ],
        1 / 25,
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_ranks_by_hand(schedule: Schedule) -> None:
    """Every start, on two micro-batches (four for dualpipev, which needs as many as stages)."""
    lists, idle = BY_HAND[schedule]
    ranks = simulate(schedule_order(schedule, 2, 4 if schedule == "dualpipev" else 2))
    wanted = [[(LETTERS[w[1]], int(w[0]), int(w[2]), float(w[4:])) for w in text.split()] for text in lists]
    assert [[tuple(span[:4]) for span in rank] for rank in ranks] == wanted
    assert idle_share(ranks) == idle
    assert disorder(ranks) == 0


def test_a_slow_stage_by_hand() -> None:
    """Stage 1 of two takes twice the time: 2+4 a micro-batch; rank 0 waits for it, and works 2 x 3 of 15."""
    ranks = simulate(schedule_order("gpipe", 2, 2), lambda kind, stage: (2 if kind == "backward" else 1) * (1 + stage))
    assert [span.start for span in ranks[0]] == [0, 1, 9, 13]
    assert [span.start for span in ranks[1]] == [1, 3, 5, 9]
    assert idle_seconds(ranks) == [9, 3]


@dataclass
class Recorder:
    """A stage that computes and sends nothing, and writes down what torch asks of it."""

    stage_index: int
    group_rank: int
    group_size: int
    num_stages: int
    log: list[Action]
    submod: None = None
    stage_index_to_group_rank: dict[int, int] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        return self.stage_index == self.num_stages - 1

    def forward_one_chunk(self, number: int, *args: Any, **kwargs: Any) -> None:
        self.log.append(Action("forward", self.stage_index, number))

    def backward_one_chunk(self, number: int, *, full_backward: bool = True, **kwargs: Any) -> None:
        self.log.append(Action("backward" if full_backward else "input gradient", self.stage_index, number))

    def backward_weight_one_chunk(self, number: int, **kwargs: Any) -> None:
        self.log.append(Action("weight gradient", self.stage_index, number))

    def __getattr__(self, name: str) -> Any:  # whatever else it asks: no operation to send or receive
        return lambda *args: []


def what_torch_runs(schedule: Schedule, pp: int, rank: int, micro_batches: int, stages: list[int]) -> list[Action]:
    """What torch's runtime has a rank with these stages do."""
    log: list[Action] = []
    num_stages = pp * len(stages)
    recorders = [Recorder(stage, rank, pp, num_stages, log) for stage in stages]
    single = schedule in ("gpipe", "1f1b")
    made = get_schedule_class(TORCH[schedule])(
        recorders[0] if single else recorders,
        micro_batches,
        loss_fn=lambda output, target: torch.zeros(()),
    )
    setattr(made, "_initialize_stage" if single else "_initialize_stages", lambda *args: None)
    made._step_microbatches(target_mbs=[None] * micro_batches)
    return log


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [2, 3])
def test_the_order_is_what_torch_runs(schedule: Schedule, pp: int) -> None:
    for m in (2 * pp, 4 * pp):
        for rank, actions in enumerate(schedule_order(schedule, pp, m)):
            stages = stages_of(rank, ParallelConfig(pp=pp, pp_schedule=schedule))
            assert what_torch_runs(schedule, pp, rank, m, stages) == actions
            assert len(set(actions)) == len(actions)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_gradient_is_computed_once(schedule: Schedule) -> None:
    done = [action for actions in schedule_order(schedule, 2, 4) for action in actions]
    stages = 2 if schedule in ("gpipe", "1f1b") else 4
    every = {(stage, number) for stage in range(stages) for number in range(4)}
    for way in (["forward"], ["backward", "input gradient"], ["backward", "weight gradient"]):
        found = [action[1:] for action in done if action.kind in way]
        assert sorted(found) == sorted(every)
    assert any(action.kind == "weight gradient" for action in done) == (schedule in ZERO_BUBBLE)


def test_no_process_is_needed() -> None:
    assert not dist.is_initialized()
    assert theoretical_bubble("zbv", 8, 64) == 7 / (6 * 64 + 7)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("1f1b", 4, 3), r"pp_schedule \(1f1b\) on pp \(4\) needs at least 4 micro-batches, not 3"),
        (("gpipe", 4, 0), "needs at least 1 micro-batches, not 0"),
        (("zbv", 1, 0), "needs at least 1 micro-batches, not 0"),
        (("gpipe", 0, 4), r"pp \(0\) must be at least 1"),
        (("gpipe", 2, 4, 2), "gpipe"),
        (("zbv", 2, 4, 3), "zbv"),
        (("dualpipev", 2, 3), "needs at least 4 micro-batches, not 3"),
        (("interleaved_1f1b", 2, 5), "5 micro-batches in 2 rounds"),
        (("breadth_first", 2, 4), "pp_schedule"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text) as error:
        theoretical_bubble(*arguments)
    assert "\n" not in str(error.value)


def swapped(order: Order, rank: int, first: int, second: int) -> Order:
    """Two actions of a rank in each other's place."""
    actions = list(order[rank])
    actions[first], actions[second] = actions[second], actions[first]
    return [*order[:rank], actions, *order[rank + 1 :]]


def test_a_wrong_order_is_refused() -> None:
    """Negative control: a backward before its forward; two ranks that wait for each other; work that nobody does."""
    order = schedule_order("1f1b", 2, 3)
    with pytest.raises(ValueError, match="rank 0 waits for ever before the backward of micro-batch 0 on stage 0"):
        simulate(swapped(order, 1, 0, 1))
    with pytest.raises(ValueError, match="waits for ever"):
        simulate(swapped(order, 0, 1, 4))
    with pytest.raises(ValueError, match="rank 0 waits for ever before the backward of micro-batch 2"):
        simulate([order[0][:3] + order[0][4:], order[1]])
    apart = schedule_order("interleaved_zero_bubble", 2, 2)
    assert (apart[1][3], apart[1][6]) == (Action("input gradient", 3, 0), Action("weight gradient", 3, 0))
    with pytest.raises(ValueError, match="waits for ever"):
        simulate(swapped(apart, 1, 3, 6))


def test_a_worse_order_idles_more() -> None:
    """Negative control of the simulation: the same work, and one weight gradient before what others wait for."""
    order = schedule_order("interleaved_zero_bubble", 2, 2)
    assert order[1][5:7] == [Action("input gradient", 3, 1), Action("weight gradient", 3, 0)]
    assert idle_share(simulate(swapped(order, 1, 5, 6))) == 2 / 14 > idle_share(simulate(order)) == 1 / 13


def test_torch_misnumbers_its_list_for_the_last_rank_of_1f1b() -> None:
    """Why the order of 1F1B is not read from torch; what torch runs is right."""
    listed = Schedule1F1B(Recorder(0, 0, 3, 3, []), 4).pipeline_order  # type: ignore[arg-type]
    assert listed is not None
    numbers = [a.microbatch_index for a in listed[2] if a is not None and a.computation_type.value == "F"]
    assert numbers == [1, 2, 3, 4]


def test_disorder_is_seen() -> None:
    """A quarter too early is a quarter; what never came is infinite; an optimizer waits for nothing."""
    ranks = simulate(schedule_order("gpipe", 3, 2))
    first = ranks[1][0]
    early = Span(first.kind, first.stage, first.micro_batch, first.start - 0.25, first.end)
    assert disorder([ranks[0], [early, *ranks[1][1:]], ranks[2]]) == 0.25
    assert disorder([ranks[0], ranks[1][1:], ranks[2]]) == float("inf")
    assert disorder([[*rank, Span("optimizer", -1, -1, 0, 1)] for rank in ranks]) == 0
