"""How many parameters a rank has is what the layers make, exactly."""

from typing import Any

import pytest

from tests.proofs.cases import VARIANTS, llama
from tpformer import GPT, GPTConfig, Llama, Mesh
from tpformer.mesh import Axis
from tpformer.models.decoder import Part
from tpformer.planner.weights import Weight, numbers, part_weights

CONFIGS = {**VARIANTS, "llama-13-layers-tied": llama(num_layers=13, tie_embeddings=True, out_bias=True)}
PARTS = [(True, True), (True, False), (False, False), (False, True)]


def built(config: Any, tp: int, rank: int, part: Part, sequence_parallel: bool) -> dict[str, int]:
    """Numbers of every parameter of the real model, on the meta device."""
    mesh = Mesh(tp=Axis("tp", tp, rank), sequence_parallel=sequence_parallel)
    kind: Any = GPT if isinstance(config, GPTConfig) else Llama
    model = kind(config, mesh, seed=None, part=part)
    return {name: p.numel() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_rank_has_as_many_parameters_as_the_model_built(name: str, tp: int) -> None:
    """Every tp rank of every part of a pipeline, and both ends of it on one process."""
    config = CONFIGS[name]
    layers = tuple(range(config.num_layers))
    for first, last in PARTS:
        for part in (Part(layers[:1], first, last), Part(layers, first, last)):
            expected = numbers(part_weights(config, tp, part))
            for rank in range(tp):
                assert expected == sum(built(config, tp, rank, part, rank % 2 == 1).values()), (part, rank)


def test_it_adds_up_to_the_whole_model() -> None:
    """num_parameters counts no padding: there is none of a vocabulary of 256."""
    for config in (llama(vocab_size=256), llama(vocab_size=256, tie_embeddings=True)):
        assert numbers(part_weights(config, 1, Part.whole(config.num_layers))) == config.num_parameters()


def test_rows_are_shared_out_as_torch_does() -> None:
    """The replica that has most of 5 rows in 4 parts has 2, and of one row the row."""
    assert [Weight("", 5, 3).numbers(shards) for shards in (1, 2, 4, 8)] == [15, 9, 6, 3]
    assert Weight("", 1, 3, times=2).numbers(4) == 6


def test_a_copied_kv_head_too_few_is_seen() -> None:
    """The control: without the copies of key and value heads the count is another."""
    config = VARIANTS["qwen2-kv1-bias"]
    part = Part.whole(config.num_layers)
    split = numbers(part_weights(config, 4, part)) - 2 * config.num_layers * config.attention.head_dim * 3 // 4
    assert split != sum(built(config, 4, 0, part, False).values())
