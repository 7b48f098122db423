"""Sharing out gradients, optimizer state and parameters changes nothing that one process computes."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed import Ranks
from tests.proofs.cases import Measured, mismatches
from tests.proofs.compositions import LENGTH, VOCABULARY, Composition, batch, steps, train, whole
from tpformer import Mesh, ParallelConfig
from tpformer.layers import init
from tpformer.parallel import fsdp
from tpformer.train.build import build
from tpformer.train.step import StepOptions, train_step

FP64 = torch.float64
CASES = {
    "fsdp": ("llama", {"dp": 2, "dp_mode": "fsdp"}),
    "zero2": ("gpt-tied", {"dp": 2, "dp_mode": "zero2"}),
    "fsdp-4": ("llama-uneven", {"dp": 4, "dp_mode": "fsdp"}),
    "hsdp": ("llama-uneven", {"dp": 4, "dp_mode": "hsdp", "dp_shard": 2}),
    "hsdp-one-group": ("gpt-untied", {"dp": 2, "dp_mode": "hsdp", "dp_shard": 2}),
    "hsdp-groups-of-one": ("gpt-untied", {"dp": 2, "dp_mode": "hsdp", "dp_shard": 1}),
    "fsdp-tp": ("llama-uneven", {"dp": 2, "tp": 2, "dp_mode": "fsdp"}),
    "fsdp-tp-sp": ("llama-uneven", {"dp": 2, "tp": 2, "dp_mode": "fsdp", "sequence_parallel": True}),
    "zero2-tp-sp": ("gpt-tied", {"dp": 2, "tp": 2, "dp_mode": "zero2", "sequence_parallel": True}),
    "fsdp-1f1b": ("llama-tied", {"dp": 2, "pp": 2, "dp_mode": "fsdp"}),
    "fsdp-interleaved": ("llama-tied", {"dp": 2, "pp": 2, "dp_mode": "fsdp", "pp_schedule": "interleaved_1f1b"}),
    "zero2-zbv": ("llama", {"dp": 2, "pp": 2, "dp_mode": "zero2", "pp_schedule": "zbv"}),
}


def composition(name: str, **options: Any) -> Composition:
    """One of CASES."""
    model, layout = CASES[name]
    parallel = ParallelConfig(**(layout | options))  # type: ignore[arg-type]
    return Composition(model, parallel, 2, FP64, parallel.tp * parallel.pp * (parallel.dp or 1))


@lru_cache
def expected(model: str) -> Measured:
    """Of one process."""
    return train(Composition(model, ParallelConfig()))[0]


def merged(answers: list[Any]) -> Measured:
    """What any rank has (a pipeline's ranks have different parameters)."""
    found: Measured = {}
    for measured, _ in answers:
        for name, value in measured.items():
            found.setdefault(name, value)
    return found


@pytest.mark.parametrize("name", CASES)
def test_three_steps_are_those_of_one_process(name: str, ranks: Ranks) -> None:
    """Losses, norms, gradients and weights, with micro-batches, dropout and clipping."""
    case = composition(name)
    found = merged(ranks(train, case.world_size, case))
    assert mismatches(expected(case.model), found, 1e-10) == []


def broken(case: Composition, how: str) -> tuple[Measured, dict[str, int]]:
    """On a rank: a run with one thing wrong."""
    reduce, default = fsdp.FSDPModule.set_gradient_divide_factor, torch.get_default_dtype()
    torch.set_default_dtype(FP64)
    try:
        if how == "averages":
            fsdp.FSDPModule.set_gradient_divide_factor = lambda unit, factor: reduce(unit, 2 * factor)  # type: ignore
        mesh = Mesh.of(case.parallel, "cpu")
        built = build(case.config(), mesh, VOCABULARY)
        known = built.optimizer.placements
        if how == "every replica counts":
            built.optimizer.placements = {name: replace(p, replica=0) for name, p in known.items()}
        if how == "copies are not summed":
            built.gradients._placements = {name: replace(p, partial=False) for name, p in known.items()}
        if how == "the first micro-batch is lost":
            _forget(built)
        return steps(case, mesh, built)
    finally:
        fsdp.FSDPModule.set_gradient_divide_factor = reduce  # type: ignore[method-assign]
        torch.set_default_dtype(default)


def _forget(built: Any) -> None:
    """What FSDP has summed so far disappears before the last backward."""
    start = built.gradients.start

    def forgetful(*, last: bool) -> None:
        start(last=last)
        for unit in built.runner.modules():
            for group in unit._get_fsdp_state()._fsdp_param_groups if isinstance(unit, fsdp.FSDPModule) else ():
                for p in group.fsdp_params if last else ():
                    p.unsharded_accumulated_grad = p.unsharded_param.grad = None

    built.gradients.start = forgetful


@pytest.mark.parametrize(
    ("name", "how", "wrong"),
    [
        ("fsdp", "averages", "gradient norm.weight"),
        ("hsdp", "every replica counts", "norm 0"),
        ("fsdp", "the first micro-batch is lost", "gradient norm.weight"),
    ],
)
def test_what_is_wrong_is_seen(name: str, how: str, wrong: str, ranks: Ranks) -> None:
    """The controls: each of these mistakes is found by the comparison above."""
    case = composition(name)
    found = merged(ranks(broken, case.world_size, case, how))
    assert any(line.startswith(wrong) for line in mismatches(expected(case.model), found, 1e-10))


def test_copies_whose_gradients_are_not_summed_are_seen(ranks: Ranks) -> None:
    """The control for tp: the rows of keys' and values' weights that two ranks hold."""
    case = composition("fsdp-tp")
    with pytest.raises(RuntimeError, match="copies of this tensor differ"):
        ranks(broken, case.world_size, case, "copies are not summed")


# what is gathered is never older than the weights


def losses(case: Composition, leaky: bool) -> list[float]:
    """On a rank: the loss without gradient before a step, after it, and with the first weights taken back."""
    default, release = torch.get_default_dtype(), fsdp._release
    torch.set_default_dtype(FP64)
    try:
        if leaky:
            fsdp._release = lambda stage: None
        mesh = Mesh.of(case.parallel, "cpu")
        built = build(case.config(), mesh, VOCABULARY)
        first = {name: x.clone() for name, x in built.optimizer.state().items()}

        def loss() -> float:
            with torch.no_grad():
                return built.runner.loss(batch(9)[:, :-1], batch(9)[:, 1:]).item()

        mine = len(batch(0)) // mesh.dp.size
        samples, found = batch(0)[mesh.dp.rank * mine :][:mine], [loss()]
        train_step(built.runner, built.gradients, built.optimizer, samples, StepOptions(micro_batch_size=2, lr=0.1))
        found.append(loss())
        with torch.no_grad():
            logits = built.runner.full_logits(batch(9)[:, :-1])
        assert logits.shape == (8, LENGTH, VOCABULARY)
        built.optimizer.load_state(first, 0)
        return [*found, loss()]
    finally:
        fsdp._release = release
        torch.set_default_dtype(default)


@pytest.mark.parametrize("name", ["zero2", "fsdp", "fsdp-1f1b"])
def test_a_loss_is_of_the_weights_that_are(name: str, ranks: Ranks) -> None:
    """Evaluating, stepping, evaluating, taking back, evaluating: each time one process's loss."""
    case = composition(name)
    alone = losses(case.alone(), False)
    assert abs(alone[0] - alone[1]) > 1e-3
    for found in ranks(losses, case.world_size, case, False):
        assert found == pytest.approx(alone, rel=1e-10)


def test_gathered_weights_that_stay_would_be_stale(ranks: Ranks) -> None:
    """The control: where nothing lets go of them, the last loss is of weights that are no more."""
    case = composition("zero2")
    alone = losses(case.alone(), False)
    for found in ranks(losses, case.world_size, case, True):
        assert abs(found[2] - alone[2]) > 1e-3


# what a rank has at the beginning


def initial(case: Composition) -> dict[str, np.ndarray]:
    """On a rank: the initial weights, put together."""
    mesh = Mesh.of(case.parallel, "cpu")
    built = build(case.config(), mesh, VOCABULARY)
    return {
        name: whole(x, built, name.removeprefix("weight/"), mesh)
        for name, x in built.optimizer.state().items()
        if name.startswith("weight/")
    }


@pytest.mark.parametrize("name", ["fsdp-4", "fsdp-tp-sp", "fsdp-interleaved"])
def test_initial_weights_are_those_of_one_process_bit_for_bit(name: str, ranks: Ranks) -> None:
    case = composition(name)
    alone = initial(case.alone())
    found: dict[str, np.ndarray] = {}
    for answer in ranks(initial, case.world_size, case):
        found |= answer
    assert alone.keys() == found.keys()
    assert all(np.array_equal(alone[key].view(np.uint8), found[key].view(np.uint8)) for key in alone)


class Watch(TorchDispatchMode):
    """The most numbers in memory behind any result of any operator; the meta device has none."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not isinstance(x, DTensor) and not x.is_meta:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result


def largest_allocation(case: Composition) -> int:
    """On a rank: numbers in the largest memory that building makes."""
    mesh = Mesh.of(case.parallel, "cpu")
    chunk, init.CHUNK = init.CHUNK, 256
    try:
        with Watch() as watch:
            build(case.config(), mesh, VOCABULARY)
    finally:
        init.CHUNK = chunk
    return watch.largest


def test_no_rank_ever_holds_a_whole_matrix(ranks: Ranks) -> None:
    """The largest is this rank's quarter of the embedding, 128 rows of 32; one process has all of it (the control)."""
    case = Composition("llama", ParallelConfig(dp=4, dp_mode="fsdp"))
    assert ranks(largest_allocation, 4, case) == [128 * 32 // 4] * 4
    assert largest_allocation(case.alone()) >= 128 * 32


# what cannot be


def refusal(case: Composition) -> str:
    """On a rank: what building raises."""
    with pytest.raises(ValueError, match="dp_mode") as error:
        build(case.config(), Mesh.of(case.parallel, "cpu"), VOCABULARY)
    return str(error.value)


def test_a_tied_embedding_at_both_ends_of_one_process_is_refused(ranks: Ranks) -> None:
    case = replace(composition("zero2-zbv"), model="llama-tied")
    expected = "pp_schedule (zbv) puts both ends of a model on one process, which dp_mode (zero2) cannot with"
    assert all(answer.startswith(expected) for answer in ranks(refusal, 4, case))


def mesh_of_another_mode() -> str:
    """On a rank: what a mesh of plain replicas raises."""
    with pytest.raises(ValueError, match=r"groups of 2 replicas") as error:
        fsdp.is_sharded(Mesh.create(dp=2, device="cpu"), ParallelConfig(dp=2, dp_mode="fsdp"))
    return str(error.value)


def test_a_mesh_made_for_another_mode_is_refused(ranks: Ranks) -> None:
    message = "dp_mode (fsdp) needs groups of 2 replicas, but the mesh has 1: make it with Mesh.of"
    assert ranks(mesh_of_another_mode, 2) == [message] * 2
