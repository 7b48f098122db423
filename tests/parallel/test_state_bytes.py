"""The bytes of model state that each mode promises are the bytes that a rank holds, within 5%."""

import gc
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.distributed import Ranks
from tests.proofs.cases import llama
from tests.proofs.compositions import batch
from tpformer import Mesh, ParallelConfig
from tpformer.parallel.state_bytes import state_bytes
from tpformer.train.build import build
from tpformer.train.config import DataConfig, RunConfig, TrainConfig
from tpformer.train.step import StepOptions, train_step

VOCABULARY, LAYERS = 128, 6  # no rows that padding would add to
MODEL = llama(vocab_size=VOCABULARY, hidden_size=128, num_layers=LAYERS, ffn_hidden_size=256)
LENGTH = 2  # a sample of few tokens: activations are counted too
Bytes = dict[str, float]


def alive() -> dict[int, torch.UntypedStorage]:
    """The memory of every tensor of this process, by address."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and not isinstance(x, DTensor)]
    gradients = [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    storages = (x.untyped_storage() for x in [*tensors, *gradients] if not isinstance(x, DTensor) and not x.is_meta)
    return {storage.data_ptr(): storage for storage in storages}


def measure(parallel: ParallelConfig, micro_batches: int) -> Bytes:
    """On a rank: bytes held at four moments of the second step, and how many parameters there are of each kind."""
    before = alive()  # stays alive, so that no new tensor has an old address
    mesh = Mesh.of(parallel, "cpu")
    config = TrainConfig(model=MODEL, run=RunConfig(), data=DataConfig(seq_len=LENGTH), parallel=parallel)
    built = build(config, mesh, VOCABULARY)
    named = dict(built.model.named_parameters())  # of DTensors, numel() is that of the tp-local parameter
    blocks = sum(p.numel() for name, p in named.items() if name.startswith("blocks."))
    ends = sum(p.numel() for name, p in named.items() if not name.startswith("blocks."))
    found: Bytes = {"parameters": blocks + ends, "ends": ends, "block": blocks / LAYERS}

    def note(moment: str) -> None:
        found[moment] = sum(x.nbytes() for address, x in alive().items() if address not in before)

    samples = batch(0)[:micro_batches, : LENGTH + 1]
    for step in range(2):
        if step == 1:
            _watch(built, note)
        train_step(built.runner, built.gradients, built.optimizer, samples, StepOptions(micro_batch_size=1, lr=0.01))
    note("after the step")
    return found


def _watch(built: Any, note: Any) -> None:
    """Have it noted in a forward, after the last forward, and after backward."""
    start, step = built.gradients.start, built.optimizer.step

    def starting(*, last: bool) -> None:
        if last:
            note("before the last backward")
        start(last=last)

    def stepping(*args: Any, **kwargs: Any) -> Any:
        note("after backward")
        return step(*args, **kwargs)

    built.gradients.start, built.optimizer.step = starting, stepping
    built.model.blocks[str(LAYERS // 2)].attention.register_forward_pre_hook(lambda *_: note("in a forward"))


SHARDED = [
    ({"dp": 2, "dp_mode": "zero2"}, 1),
    ({"dp": 2, "dp_mode": "zero2", "precision": "bf16"}, 2),
    ({"dp": 2, "dp_mode": "fsdp", "precision": "bf16"}, 1),
    ({"dp": 2, "dp_mode": "fsdp"}, 2),
    ({"dp": 4, "dp_mode": "fsdp", "precision": "bf16"}, 1),
    ({"dp": 4, "dp_mode": "hsdp", "dp_shard": 2}, 1),
    ({"dp": 2, "tp": 2, "dp_mode": "zero2", "sequence_parallel": True}, 1),
    ({"dp": 2, "tp": 2, "dp_mode": "fsdp", "precision": "bf16"}, 1),
]


@pytest.mark.parametrize(("layout", "micro_batches"), SHARDED, ids=str)
def test_a_rank_holds_its_share_within_five_percent(layout: dict[str, Any], micro_batches: int, ranks: Ranks) -> None:
    """Divided as the mode promises: at each moment the parts of the formula that are there then, and no more."""
    parallel = ParallelConfig(**layout)
    shards = parallel.dp_shard or parallel.dp or 1
    each = state_bytes(parallel, shards, micro_batches)
    assert each.between_steps == 16 / shards
    for found in ranks(measure, (parallel.dp or 1) * parallel.tp, parallel, micro_batches):
        count = found["parameters"]
        assert found["after backward"] == pytest.approx(count * each.between_steps, rel=0.05)
        assert found["after the step"] == pytest.approx(count * (each.between_steps - each.gradients), rel=0.05)
        waiting = count * (each.weights + each.moments + each.copy + each.accumulated) + found["ends"] * each.gathered
        assert found["before the last backward"] == pytest.approx(waiting, rel=0.05)
        # the block, what it was copied from, and the next one's gather on its way
        gathered = (found["in a forward"] - waiting) / found["block"]
        slack = 0.05 * waiting / found["block"]
        assert each.gathered - slack <= gathered <= 3 * each.gathered + slack


@pytest.mark.parametrize(("precision", "total", "tp"), [("fp32", 16, 1), ("bf16", 18, 2)])
def test_replicas_hold_everything(precision: str, total: int, tp: int, ranks: Ranks) -> None:
    parallel = ParallelConfig(dp=2, tp=tp, precision=precision)  # type: ignore[arg-type]
    each = state_bytes(parallel, 1)
    assert each.held == total
    for found in ranks(measure, 2 * tp, parallel, 2):
        for moment in ("before the last backward", "after backward", "after the step"):
            assert found[moment] == pytest.approx(found["parameters"] * total, rel=0.05), moment


def test_the_table() -> None:
    """Bytes a parameter at most and between steps, by hand: on 4 replicas."""
    expected = {
        ("fp32", "replicate"): (16, 16),
        ("bf16", "replicate"): (18, 16),
        ("fp16", "replicate"): (18, 16),
        ("fp32", "zero2"): (8, 4),
        ("bf16", "zero2"): (6, 4),
        ("fp32", "fsdp"): (4, 4),
        ("bf16", "hsdp"): (4, 4),
    }
    for (precision, mode), (held, between) in expected.items():
        each = state_bytes(ParallelConfig(precision=precision, dp_mode=mode), 4)  # type: ignore[arg-type]
        assert (each.held, each.between_steps) == (held, between), (precision, mode)
    pipelined = state_bytes(ParallelConfig(pp=2, dp_mode="fsdp", precision="bf16"), 4, micro_batches=2)
    assert (pipelined.copy, pipelined.gathered, pipelined.accumulated, pipelined.held) == (2, 0, 4, 10)


def leak(parallel: ParallelConfig) -> Bytes:
    """On a rank: the same, with a second copy of the masters that nobody needs."""
    from tpformer.train import optimizer

    before = optimizer.local_part
    copies: list[torch.Tensor] = []

    def copying(x: torch.Tensor) -> torch.Tensor:
        copies.append(before(x).clone())
        return before(x)

    optimizer.local_part = copying
    try:
        return measure(parallel, 1)
    finally:
        optimizer.local_part = before


def test_a_copy_too_many_is_seen(ranks: Ranks) -> None:
    """The control: masters that are held twice."""
    parallel = ParallelConfig(dp=2, dp_mode="fsdp")
    for found in ranks(leak, 2, parallel):
        assert found["after backward"] == pytest.approx(found["parameters"] * 10, rel=0.05)
