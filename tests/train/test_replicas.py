"""One bit of one copy on one rank is found and named, whatever it is a copy of; without it nothing is said."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import Ranks
from tests.proofs.compositions import VOCABULARY, Composition, batch
from tests.train import runs
from tpformer import Mesh, ParallelConfig
from tpformer.train import replicas
from tpformer.train.build import build
from tpformer.train.replicas import ReplicaDriftError, check_replicas, checksum
from tpformer.train.step import StepOptions, train_step
from tpformer.train.trainer import Trainer

LAYOUTS = {
    "tp 2": ParallelConfig(tp=2),
    "tp 4": ParallelConfig(tp=4),
    "tp 2 sp": ParallelConfig(tp=2, sequence_parallel=True),
    "dp 2": ParallelConfig(dp=2),
    "tp 2 x dp 2": ParallelConfig(tp=2, dp=2),
    "pp 2": ParallelConfig(pp=2),
    "pp 2 x tp 2, zbv": ParallelConfig(pp=2, tp=2, pp_schedule="zbv"),
    "dp 2, zero2": ParallelConfig(dp=2, dp_mode="zero2"),
    "dp 2, fsdp x tp 2": ParallelConfig(dp=2, tp=2, dp_mode="fsdp"),
    "dp 4, hsdp": ParallelConfig(dp=4, dp_mode="hsdp", dp_shard=2),
    "pp 2 x dp 2": ParallelConfig(pp=2, dp=2),
}
# a layout, the model, the tensor of which one bit changes, the rank on which it does, and what must be said
FLIPS: dict[str, tuple[str, str, str, int, str]] = {
    "a norm over tp": (
        "tp 2",
        "llama",
        "weight/blocks.1.mlp_norm.weight",
        1,
        "tp 0 and 1|0 and 1",
    ),
    "one of four": ("tp 4", "gpt-tied", "weight/norm.weight", 2, "tp 0 1 3 and 2|0 1 3 and 2"),
    "key-value heads": (
        "tp 4",
        "llama",
        "weight/blocks.0.attention.qkv.weight",
        3,
        "tp 2 and 3|2 and 3",
    ),
    "a moment": ("tp 2 sp", "llama", "exp_avg/blocks.0.attention_norm.weight", 0, "tp 0 and 1|0 and 1"),
    "its square": ("tp 2 x dp 2", "llama", "exp_avg_sq/norm.weight", 3, "dp 0 and 1|1 and 3"),
    "a replica's part": (
        "dp 2",
        "llama",
        "weight/blocks.3.mlp.down.weight",
        1,
        "dp 0 and 1|0 and 1",
    ),
    "a replica's half": (
        "tp 2 x dp 2",
        "llama",
        "weight/blocks.3.mlp.down.weight",
        3,
        "dp 0 and 1|1 and 3",
    ),
    "tied to the last stage": ("pp 2", "llama-tied", "weight/embedding.weight", 1, "pp 0 and 1|0 and 1"),
    "its moment": ("pp 2 x dp 2", "llama-tied", "exp_avg/embedding.weight", 0, "pp 0 and 1|0 and 2"),
    "in a stage": (
        "pp 2 x tp 2, zbv",
        "llama",
        "weight/blocks.2.mlp_norm.weight",
        2,
        "tp 0 and 1|2 and 3",
    ),
    "rows of a norm": (
        "dp 2, fsdp x tp 2",
        "llama",
        "weight/blocks.1.mlp_norm.weight",
        3,
        "tp 0 and 1|2 and 3",
    ),
    "rows of a replica": (
        "dp 4, hsdp",
        "llama",
        "exp_avg/blocks.1.mlp.down.weight",
        2,
        "dp_replicate 0 and 1|0 and 2",
    ),
}


def after_a_step(parallel: ParallelConfig, model: str) -> tuple[Any, Mesh]:
    """On a rank: an optimizer that has taken a step."""
    mesh = Mesh.of(parallel, "cpu")
    built = build(Composition(model, parallel).config(), mesh, VOCABULARY)
    train_step(
        built.runner, built.gradients, built.optimizer, batch(0).chunk(mesh.dp.size)[mesh.dp.rank], StepOptions(2, 0.01)
    )
    return built.optimizer, mesh


def complaint(optimizer: Any, mesh: Mesh) -> str:
    try:
        check_replicas(optimizer.state(), optimizer.placements, mesh, 40)
    except ReplicaDriftError as error:
        return str(error)
    return ""


def flip(x: torch.Tensor) -> None:
    """The lowest bit of a number: of an embedding's first, as its last rows are padding, otherwise of the last."""
    bits = x.view(-1)[: 1 if len(x) == 128 else None][-1:].view(torch.int32)
    bits ^= 1


def flipped(parallel: ParallelConfig, model: str, name: str, rank: int) -> tuple[str, str, str]:
    """On a rank: what is said before one bit of one rank's tensor changes, when it has, and when it is undone."""
    optimizer, mesh = after_a_step(parallel, model)
    said = [complaint(optimizer, mesh)]
    for _ in range(2):
        if mesh.world.rank == rank:
            flip(optimizer.state()[name])
        said.append(complaint(optimizer, mesh))
    return said[0], said[1], said[2]


@pytest.mark.parametrize("what", FLIPS)
def test_one_bit_is_found_and_named_on_every_rank(what: str, ranks: Ranks) -> None:
    layout, model, name, rank, where = FLIPS[what]
    parallel = LAYOUTS[layout]
    found = ranks(flipped, parallel.pp * parallel.tp * (parallel.dp or 1), parallel, model, name, rank)
    assert len(set(found)) == 1
    before, said, after = found[0]
    assert (before, after) == ("", "")
    kind, parameter = name.split("/")
    assert said.startswith(f"{parameter if kind == 'weight' else f'{kind} of {parameter}'} differs between ")
    axis, near, far = re.fullmatch(r"(\w+) (.*)\|(.*)", where).groups()  # type: ignore[union-attr]
    assert said.endswith(f" differs between {axis} ranks {near} (of all ranks {far}) at step 40")


def silent(parallel: ParallelConfig, model: str) -> tuple[str, int]:
    """On a rank: what is said after a step, and of how many slices there was a checksum."""
    optimizer, mesh = after_a_step(parallel, model)
    return complaint(optimizer, mesh), len(replicas.checksums(optimizer.state(), optimizer.placements))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ["llama-uneven", "gpt-tied"])
def test_nothing_is_said_of_what_is_right(layout: str, model: str, ranks: Ranks) -> None:
    if (layout, model) == ("tp 4", "llama-uneven"):
        model = "llama"  # 42 is not divided by 4
    parallel = LAYOUTS[layout]
    if parallel.pp_schedule == "zbv" and model == "llama-uneven":
        model = "llama"  # it has two layers, for four stages
    for said, slices in ranks(silent, parallel.pp * parallel.tp * (parallel.dp or 1), parallel, model):
        assert said == ""
        assert slices > 10


def only_over_tp(parallel: ParallelConfig, model: str, name: str, rank: int) -> str:
    """The control: replicas are not compared."""
    optimizer, mesh = after_a_step(parallel, model)
    if mesh.world.rank == rank:
        flip(optimizer.state()[name])
    return complaint(optimizer, replace(mesh, dp_replicate=Mesh().dp))


def test_an_axis_left_out_would_be_seen(ranks: Ranks) -> None:
    layout, model, name, rank, _ = FLIPS["a replica's half"]
    assert ranks(only_over_tp, 4, LAYOUTS[layout], model, name, rank) == [""] * 4


# the checksum


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8])
def test_every_bit_of_every_number_counts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_CHUNK", 4)
    x = torch.arange(1, 12).to(dtype).view(11, 1).expand(11, 2)[:, 1]  # not contiguous
    assert checksum(x) == checksum(x.clone())
    seen = {int(checksum(x))}
    for place in range(11):
        for bit in range(8 * x.element_size()):
            changed = x.clone()
            changed.view(torch.uint8).view(11, -1)[place, bit // 8] ^= 1 << bit % 8
            seen.add(int(checksum(changed)))
    assert len(seen) == 1 + 11 * 8 * x.element_size()


def test_two_signs_do_not_cancel() -> None:
    """The highest bit of a number of 64 bits would count the same wherever it is: they are taken by halves."""
    a = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert checksum(a) != checksum(a * torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64))


def test_order_signs_of_zero_and_nan_count() -> None:
    a = torch.tensor([1.0, 2.0, 0.0, torch.nan])
    assert checksum(a) == checksum(a.clone())
    assert checksum(a) != checksum(a[[1, 0, 2, 3]])
    assert checksum(a) != checksum(torch.tensor([1.0, 2.0, -0.0, torch.nan]))
    assert checksum(torch.empty(0)) == 0


# in a run


class DriftingTrainer(Trainer):
    """Before its third step a bit changes on the last rank."""

    def _train_step(self) -> Any:
        if self.step == 2 and self.mesh.world.rank == self.mesh.world.size - 1:
            flip(self.optimizer.state()["weight/norm.weight"])
        return super()._train_step()


def drifting(directory: Path, every: int) -> tuple[str, int, list[str]]:
    """On a rank: what a run with --check-replicas says, at which step, and the checkpoints that it leaves."""
    directory.mkdir(exist_ok=True)
    config = runs.config(check_replicas=every, checkpoint_interval=2, sample_tokens=0)
    config = replace(config, parallel=ParallelConfig(dp=2))
    trainer = DriftingTrainer(config, Mesh.of(config.parallel, "cpu"), runs.corpus(), directory)
    said = ""
    try:
        trainer.run()
    except ReplicaDriftError as error:
        said = str(error)
    return said, trainer.step, sorted(path.name for path in (directory / "checkpoints").iterdir())


def test_a_run_stops_before_it_saves_what_has_drifted(tmp_path: Path, ranks: Ranks) -> None:
    saved = ["step_00000002"]
    for said, step, checkpoints in ranks(drifting, 2, tmp_path / "checked", 4):
        assert (step, checkpoints) == (4, saved)
        assert said == "norm.weight differs between dp ranks 0 and 1 (of all ranks 0 and 1) at step 4"
    for said, step, _ in ranks(drifting, 2, tmp_path / "not", 0):
        assert (said, step) == ("", 6)
