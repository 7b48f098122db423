"""Which layers a stage has, which stages a process has, and what is refused, in one line and before any process."""

import itertools
from typing import Any

import pytest

from tests.proofs.cases import gpt, llama
from tpformer import ParallelConfig
from tpformer.models.decoder import Part
from tpformer.parallel.split import balanced, check_micro_batches, layer_costs, part_of, rank_of, stage_parts, stages_of


@pytest.mark.parametrize("layers", [4, 5, 7])
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("last", [0.0, 1.0, 2.5])
def test_no_other_split_is_more_even(layers: int, stages: int, last: float) -> None:
    """Against every split there is."""

    def cost(counts: tuple[int, ...]) -> float:
        extra = [0.25, *[0.0] * (stages - 2), last]
        return sum((count + more) ** 2 for count, more in zip(counts, extra, strict=True))

    every = [c for c in itertools.product(range(1, layers + 1), repeat=stages) if sum(c) == layers]
    found = balanced(layers, stages, 0.25, 1.0, last)
    assert sum(found) == layers
    assert cost(tuple(found)) == min(map(cost, every))


def test_the_head_counts() -> None:
    """Eight blocks and a head worth two: the last stage has fewer blocks."""
    wide = llama(num_layers=8, vocab_size=8192)
    _, block, head = layer_costs(wide, 16)
    assert head == 6 * 8192 * 32
    assert block * 8 + head == wide.flops_per_token(16)
    sizes = [len(part.layers) for part in stage_parts(wide, ParallelConfig(pp=2), 16)]
    assert sizes[0] > sizes[1]
    assert [len(p.layers) for p in stage_parts(llama(num_layers=8, vocab_size=8), ParallelConfig(pp=2), 16)] == [4, 4]


def test_an_explicit_list_is_taken_as_it_is() -> None:
    parts = stage_parts(gpt(num_layers=4), ParallelConfig(pp=2, layers_per_stage=(1, 3)), 8)
    assert parts == [Part((0,), True, False), Part((1, 2, 3), False, True)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("1f1b", [[0], [1], [2]]),
        ("interleaved_1f1b", [[0, 3], [1, 4], [2, 5]]),
        ("zbv", [[0, 5], [1, 4], [2, 3]]),
        ("dualpipev", [[0, 5], [1, 4], [2, 3]]),
    ],
)
def test_stages_of_a_rank(schedule: Any, expected: list[list[int]]) -> None:
    """One, round and round, or down and up again; a rank builds what its stages have, and nothing twice."""
    config = ParallelConfig(pp=3, pp_schedule=schedule)
    assert [stages_of(rank, config) for rank in range(3)] == expected
    assert all(rank_of(stage, config) == rank for rank, stages in enumerate(expected) for stage in stages)
    parts = stage_parts(llama(num_layers=6), config, 8)
    built = [part_of(rank, parts, config) for rank in range(3)]
    assert sorted(layer for part in built for layer in part.layers) == list(range(6))
    assert sum(part.first for part in built) == sum(part.last for part in built) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pp": 2, "layers_per_stage": (1, 2)}, r"layers_per_stage \(1, 2\) adds up to 3, but num_layers is 4"),
        ({"pp": 8}, r"num_layers \(4\) must be at least the number of pipeline stages \(8\)"),
        ({"pp": 3, "pp_schedule": "zbv"}, r"num_layers \(4\) must be at least the number of pipeline stages \(6\)"),
        ({"pp": 2, "layers_per_stage": (4,)}, r"has 1 entries, but pp \(2\) x stages_per_rank \(1\) makes 2 stages"),
        ({"pp": 2, "layers_per_stage": (0, 4)}, r"layers_per_stage \(0, 4\) must all be at least 1"),
        ({"pp": 2, "stages_per_rank": 2}, r"pp_schedule \(1f1b\) has one stage a rank, not 2"),
        ({"pp": 2, "pp_schedule": "zbv", "stages_per_rank": 3}, r"pp_schedule \(zbv\) has two stages a rank, not 3"),
        ({"pp": 2, "pp_schedule": "zbv", "compile": True}, r"compile cannot be used with pp_schedule \(zbv\)"),
        ({"pp_schedule": "2f2b"}, r"pp_schedule \('2f2b'\) must be one of 'gpipe', '1f1b'"),
        ({"dp_shard": 2}, r"dp_shard \(2\) is for dp_mode hsdp, not replicate"),
        ({"recompute": "selective", "recompute_modules": ()}, r"recompute selective needs recompute_modules"),
        ({"recompute_every": 0}, r"recompute_every \(0\) must be at least 1"),
    ],
)
def test_what_cannot_be_split_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage_parts(llama(num_layers=4), ParallelConfig(**options), 8)


@pytest.mark.parametrize(
    ("schedule", "pp", "count", "message"),
    [
        ("1f1b", 4, 3, r"pp_schedule \(1f1b\) on pp \(4\) needs at least 4 micro-batches, not 3"),
        ("dualpipev", 2, 3, r"pp_schedule \(dualpipev\) on pp \(2\) needs at least 4 micro-batches, not 3"),
        ("zbv", 2, 1, r"needs at least 2 micro-batches, not 1"),
        ("interleaved_1f1b", 2, 5, r"runs 5 micro-batches in 2 rounds, by which they must be divisible"),
        ("interleaved_zero_bubble", 2, 5, r"runs 5 micro-batches in 2 rounds"),
    ],
)
def test_micro_batches_that_a_schedule_cannot_run(schedule: Any, pp: int, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_micro_batches(ParallelConfig(pp=pp, pp_schedule=schedule), count)
    check_micro_batches(ParallelConfig(pp=pp, pp_schedule=schedule), 8)
    check_micro_batches(ParallelConfig(pp=pp, pp_schedule="gpipe"), 1)
