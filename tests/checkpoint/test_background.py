"""Saving in the background: what is written is the state of the moment, the run goes on meanwhile, one at a time."""

import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

import tpformer
from tests.checkpoint.cases import load_tiny, parts, tiny
from tests.distributed import Ranks
from tests.proofs.cases import Layout
from tpformer import Mesh
from tpformer.checkpoint import background
from tpformer.checkpoint.background import Checkpoints, Saved
from tpformer.checkpoint.chunks import chunks
from tpformer.checkpoint.store import Retention, latest_checkpoint


class Gate:
    """Holds up save_checkpoint until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        real = background.save_checkpoint

        def held(*arguments: object, **options: object) -> object:
            assert self.open.wait(30)
            return real(*arguments, **options)  # type: ignore[arg-type]

        patch.setattr(background, "save_checkpoint", held)


def test_the_numbers_are_those_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change while the writer waits; without the copy the checkpoint would have the later ones."""
    gate, part = Gate(monkeypatch), tiny(1)
    checkpoints = Checkpoints(tmp_path, Mesh())
    assert checkpoints.save(1, [part], {}) == []
    part.local.fill_(2)
    assert latest_checkpoint(tmp_path) is None
    gate.open.set()
    (saved,) = checkpoints.wait()
    assert checkpoints.wait() == []
    assert saved.step == 1
    assert load_tiny(tmp_path / "step_00000001") == (1, 1.0)


def test_without_the_copy_they_would_be_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    gate, part = Gate(monkeypatch), tiny(1)
    checkpoints = Checkpoints(tmp_path, Mesh())
    monkeypatch.setattr(checkpoints._staging, "copy", chunks)
    checkpoints.save(1, [part], {})
    part.local.fill_(2)
    gate.open.set()
    checkpoints.wait()
    assert load_tiny(tmp_path / "step_00000001") == (1, 2.0)


def test_one_at_a_time_and_the_memory_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second save waits for the first one, which stalls, and says so."""
    gate, part = Gate(monkeypatch), tiny(1)
    checkpoints = Checkpoints(tmp_path, Mesh(), Retention(2))
    checkpoints.save(1, [part], {})
    threading.Timer(0.3, gate.open.set).start()
    part.local.fill_(2)
    (first,) = checkpoints.save(2, [part], {})
    (second,) = checkpoints.wait()
    assert [first.step, second.step] == [1, 2]
    assert first.stall_seconds < 0.25 < first.seconds
    assert second.stall_seconds > 0.2
    for step in (1, 2):
        assert load_tiny(tmp_path / f"step_{step:08d}") == (step, float(step))


def test_at_once_it_stalls_for_all_of_it(tmp_path: Path) -> None:
    (saved,) = Checkpoints(tmp_path, Mesh(), background=False).save(1, [tiny(1)], {})
    assert saved == Saved(1, saved.seconds, saved.seconds)
    assert load_tiny(tmp_path / "step_00000001") == (1, 1.0)


def collectives_meanwhile(directory: Path) -> tuple[list[str], int, float]:
    """On a rank of four: save in the background while the main thread communicates on every axis; what was traced,
    the number of threads that are left, and the last sum."""
    mesh = Layout(2, 2).mesh()
    checkpoints = Checkpoints(directory, mesh)
    found = parts("gpt-untied", mesh, 1)
    x = found[0].local.new_ones(1000)
    with tpformer.trace_communication() as trace:
        for step in range(1, 4):
            checkpoints.save(step, found, {})
            for _ in range(5):
                for axis in (mesh.tp, mesh.dp, mesh.world):
                    dist.all_reduce(x, group=axis.group)
                    x /= axis.size
    checkpoints.wait()
    time.sleep(0.05)
    left = sum(thread.name.startswith("checkpoint") for thread in threading.enumerate())
    return sorted(call.op for call in trace.calls), left, x[0].item()


def test_it_has_a_group_of_its_own(tmp_path: Path, ranks: Ranks) -> None:
    """Its collectives mix with nobody's, are in nobody's trace, and its threads end."""
    for ops, left, last in ranks(collectives_meanwhile, 4, tmp_path):
        assert ops == ["all_gather"] * 3 + ["all_reduce"] * 45  # whether all ranks have copied, and our own
        assert left == 0
        assert last == 1.0
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_{i:08d}" for i in (1, 2, 3)]


def two_meshes(directory: Path) -> list[int]:
    """On a rank of two: a mesh that is closed takes the group along; the next save makes another."""
    found = []
    mesh = Layout(2).mesh()
    checkpoints = Checkpoints(directory, mesh)
    for step in (1, 2):
        checkpoints.save(step, parts("gpt-untied", mesh, step), {})
        found += [saved.step for saved in checkpoints.wait()]
    group = checkpoints._group()
    assert group is not None
    del group
    mesh.close()
    assert checkpoints._group() is None, "torch alone held it"
    return found


def test_the_group_goes_with_the_mesh(tmp_path: Path, ranks: Ranks) -> None:
    """A gloo group that is still held when the interpreter ends aborts the process."""
    assert ranks(two_meshes, 2, tmp_path) == [[1, 2]] * 2
