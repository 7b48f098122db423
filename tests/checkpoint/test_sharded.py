"""A run whose state is shared out saves what any other layout reads, bit for bit, and reads what any has saved."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.distributed import Ranks
from tests.proofs.cases import Measured
from tests.train.runs import KilledTrainer, config, corpus, records, resumed
from tpformer import Mesh, ParallelConfig
from tpformer.placement import gather_full
from tpformer.train.trainer import Trainer

SHARED = ParallelConfig(tp=2, dp=2, dp_mode="fsdp")


def trainer(parallel: ParallelConfig, directory: Path, resume: bool) -> KilledTrainer:
    """On a rank: a run on this layout; the held-out samples are no multiple of the replicas' batches."""
    settings = config("llama", eval_samples=9, checkpoint_interval=0)
    directory.mkdir(exist_ok=True)
    settings = replace(resumed(settings) if resume else settings, parallel=parallel)
    return KilledTrainer(settings, Mesh.of(parallel, "cpu"), corpus(), directory)


def state(run: Trainer) -> Measured:
    """All weights and moments, whole; collective."""
    known, mesh = run.optimizer.placements, run.mesh
    return {
        name: gather_full(part, known[name.split("/", 1)[1]], mesh.tp, mesh.dp_shard).numpy()
        for name, part in run.optimizer.state().items()
    }


def begin(parallel: ParallelConfig, directory: Path) -> Measured:
    """On a rank: two steps, and a checkpoint."""
    run = trainer(parallel, directory, resume=False)
    _steps(run, 2)
    run.save()
    return state(run)


def _steps(run: KilledTrainer, count: int) -> None:
    run.last = count
    for _ in range(count):
        run._train_step()


def through(parallel: ParallelConfig, directory: Path) -> Measured:
    """On a rank: load the checkpoint, and save it again as this layout does."""
    run = trainer(parallel, directory, resume=True)
    assert run.step == 2
    run.save()
    return state(run)


def same(a: Measured, b: Measured) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(np.array_equal(a[name].view(np.uint8), b[name].view(np.uint8)) for name in a)


def test_from_shared_out_to_four_to_one_and_back_bit_for_bit(tmp_path: Path, ranks: Ranks) -> None:
    """fsdp x tp 2 -> tp 4 -> one process -> hsdp -> fsdp x tp 2, whose files are the first's."""
    expected = ranks(begin, 4, SHARED, tmp_path)[0]
    files = sorted((tmp_path / "checkpoints" / "step_00000002").glob("*.safetensors"))
    first = [load_file(path) for path in files]
    assert len(first) == 4
    elements = sum(x.size for part in first for x in part.values())
    assert elements == sum(x.size for x in expected.values())  # nothing is saved twice
    for parallel in (ParallelConfig(tp=4), ParallelConfig(), ParallelConfig(dp=4, dp_mode="hsdp", dp_shard=2), SHARED):
        for found in ranks(through, parallel.tp * (parallel.dp or 1), parallel, tmp_path):
            assert same(found, expected), parallel
    again = [load_file(path) for path in files]
    assert all(same(a, b) for a, b in zip(first, again, strict=True))


def evaluated(parallel: ParallelConfig, directory: Path, steps: int | None) -> None:
    """On a rank: six steps, evaluations and a sample; or as many steps, and then the rest in a second run."""
    if steps is not None:
        run = trainer(parallel, directory, resume=False)
        _steps(run, steps)
        run.save()
        run = trainer(parallel, directory, resume=True)
    else:
        run = trainer(parallel, directory, resume=False)
    run.last = -1
    run.run()


@pytest.mark.parametrize("mode", ["fsdp", "zero2"])
def test_a_whole_run_is_that_of_one_process(mode: str, tmp_path: Path, ranks: Ranks) -> None:
    """Also evaluation, where one replica has a batch more than the other, and going on after two steps."""
    parallel = ParallelConfig(dp=2, dp_mode=mode)  # type: ignore[arg-type]
    ranks(evaluated, 1, ParallelConfig(), tmp_path / "alone", None)
    ranks(evaluated, 2, parallel, tmp_path / "shared", 2)
    alone, shared = (
        {(r["step"], k): v for r in records(tmp_path / d) for k, v in r.items()} for d in ("alone", "shared")
    )
    held_out = [key for key in shared if key[1] == "validation_loss"]
    assert len(held_out) == 2
    assert len(shared) > 8
    for key, value in shared.items():
        assert value == pytest.approx(alone[key], rel=1e-5), key
