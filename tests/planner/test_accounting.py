"""The bytes of a model's state: as the layers, the modules and the published counts have them."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.proofs.cases import VARIANTS
from tpformer import GPT, GPTConfig, Llama, Mesh, ParallelConfig
from tpformer.mesh import Axis
from tpformer.parallel.state_bytes import state_bytes
from tpformer.planner.accounting import RECIPES, Accounting, Layer, Recipe, accounting
from tpformer.planner.candidate import ModelConfig


def model_of(config: ModelConfig, tp: int, rank: int = 0) -> nn.Module:
    """On the meta device."""
    kind: Any = GPT if isinstance(config, GPTConfig) else Llama
    return kind(config, Mesh(tp=Axis("tp", tp, rank)), seed=None)


def by_kind(found: Accounting) -> dict[str, Layer]:
    """The layers, the blocks of a module named as those of a config."""
    names = {one.name: one.name.replace("blocks.", "block ").removesuffix(".weight") for one in found.layers}
    return {names[one.name]: one for one in found.layers}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("tp", [1, 2])
def test_a_config_has_what_its_model_has(name: str, tp: int) -> None:
    """Layer by layer: all of it without padding, the rank's part with it, and its share among three replicas."""
    config = VARIANTS[name]
    ours = by_kind(accounting(config, ParallelConfig(tp=tp), shards=3))
    theirs = by_kind(accounting(model_of(config, tp), shards=3))
    assert ours.keys() == theirs.keys()
    for kind, layer in ours.items():
        numbers = [(x.whole, x.local, x.rows, x.trainable, x.trainable_rows) for x in (layer, theirs[kind])]
        assert numbers[0] == numbers[1], kind
    assert sum(layer.whole for layer in ours.values()) == config.num_parameters()


def test_a_stage_has_its_layers_only() -> None:
    config = VARIANTS["gpt-tied"]
    stages = [accounting(config, ParallelConfig(pp=2), pp_rank=rank) for rank in range(2)]
    names = [[layer.name for layer in stage.layers] for stage in stages]
    assert names == [["block 0", "embedding.weight", "position.weight"], ["block 1", "embedding.weight", "norm"]]


def test_bytes_of_a_parameter() -> None:
    """By hand: ZeRO (arXiv 1910.02054, section 3.1) has 16 in fp16; a narrow gradient beside its fp32 sum makes 20."""
    assert Recipe("fp16", "AdamW", "narrow").bytes == 16
    assert Recipe("bf16", "AdamW", "both").bytes == 20
    ours = {recipe.precision: recipe.bytes for recipe in RECIPES if recipe.ours}
    assert ours == {"fp32": 16, "bf16": 18, "fp16": 18}
    for precision, total in ours.items():
        assert state_bytes(ParallelConfig(precision=precision), 1).held == total
    assert Recipe("fp32", "SGD").bytes == 8
    assert Recipe("fp32", "AdamW 8-bit").bytes == 10
    with pytest.raises(ValueError, match="of precision fp32 are fp32"):
        Recipe("fp32", "AdamW", "both")


@pytest.mark.parametrize("mode", ["replicate", "zero2", "fsdp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ours_is_what_a_rank_is_measured_to_hold(mode: Any, precision: Any) -> None:
    """state_bytes, which tests/parallel/test_state_bytes.py measures, of rows that divide."""
    found = Accounting((Layer("a", 1024, 1024, 256, 1024, 256),), 4)
    each = state_bytes(ParallelConfig(dp_mode=mode, precision=precision), 4)
    assert found.bytes(Recipe(precision), mode) == 1024 * each.held
    kept = state_bytes(ParallelConfig(pp=2, dp_mode=mode, precision=precision), 4)
    assert found.bytes(Recipe(precision), mode, pp=2) == 1024 * kept.held


class Theirs(nn.Module):
    """Somebody's model: a shared weight, a frozen one, a list of layers, a number."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.layers[1].requires_grad_(False)


def test_any_module() -> None:
    """Shared parameters once; frozen ones without gradients and optimizer state."""
    found = accounting(Theirs(), shards=4)
    numbers = {one.name: (one.whole, one.local, one.rows, one.trainable) for one in found.layers}
    assert numbers == {
        "scale": (1, 1, 1, 1),
        "embedding": (60, 60, 18, 60),
        "layers.0": (42, 42, 14, 42),
        "layers.1": (42, 42, 14, 0),
    }
    trained = 1 + 60 + 42
    assert found.bytes(Recipe("fp32")) == trained * 16 + 42 * 4
    assert found.bytes(Recipe("bf16")) == trained * 18 + 42 * 6
    assert found.bytes(Recipe("fp32"), "fsdp") == (1 + 18 + 14) * 16 + 14 * 4


def test_one_that_was_counted_twice_is_seen() -> None:
    """The control: an untied head."""
    untied = Theirs()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    assert accounting(untied).bytes(Recipe()) == accounting(Theirs()).bytes(Recipe()) + 60 * 16


def test_the_table() -> None:
    """A line a layer, blocks that are alike together, and one a recipe with the MiB of each mode."""
    text = str(accounting(VARIANTS["gpt-tied"], ParallelConfig(tp=2), shards=2))
    assert len(text.splitlines()) == 1 + 4 + 1 + 1 + 2 + len(RECIPES)
    assert "replicate     zero2 / 2      fsdp / 2" in text
    assert "AdamW        fp32       tpformer " in text
    assert "AdamW        both       to compare" in text
