"""A writer killed at any moment leaves the former checkpoint: whole, the latest, and with everything in it.

Killed before each single call to the system that changes the disk, which is each state that it can be in; and killed
by SIGKILL at random moments, which are mostly within them, with the writing in the background as well.
"""

import itertools
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.cases import load_tiny, save_tiny, tiny
from tpformer import Mesh
from tpformer.checkpoint.background import Checkpoints
from tpformer.checkpoint.store import Retention, latest_checkpoint


@pytest.fixture(scope="module")
def alone() -> Iterator[ProcessPoolExecutor]:
    """A process with one thread: a fork of one with more may find a lock held by a thread that it does not have."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def save_step(directory: Path, step: int, keep: int = 0) -> None:
    """As the trainer does: save, and let go of old ones."""
    save_tiny(directory, step, retention=Retention(keep))


def latest_step(directory: Path) -> int:
    """The step of the latest checkpoint, which must load and hold that step's numbers; 0 if there is none."""
    path = latest_checkpoint(directory)
    if path is None:
        return 0
    step, value = load_tiny(path)
    assert value == step, f"{path} is of step {step}"
    return step


def in_child(action: Callable[[], None]) -> int:
    """Start a process of its own that runs the action, and return its id; it ends with 0 if the action does."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def exit_code(child: int) -> int:
    """Wait for a child's end."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")  # and what opens a file, writes to one, or syncs it


def killed_before_change(number: int, directory: Path, action: Callable[[], None]) -> bool:
    """Run the action in a child that is gone before its change number `number` of the disk; did it come that far?"""

    def audited() -> None:
        changes = itertools.count()

        def change(*_: Any) -> None:
            if next(changes) == number:
                os._exit(77)

        def changed(real: Callable[..., Any], *arguments: Any) -> Any:
            change()
            return real(*arguments)

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event in CHANGES or (event == "open" and str(arguments[0]).startswith(str(directory))):
                change()

        for name in ("pwrite", "fsync"):
            real = getattr(os, name)
            setattr(os, name, partial(changed, real))
        sys.addaudithook(audit)
        action()

    code = exit_code(in_child(audited))
    assert code in (0, 77)
    return code == 77


# the steps that are there, and those that the killed writer saves or keeps: each a way through the store's code
SCENES = {"the first": ((), 5, 0), "one more": ((3, 4), 5, 0), "one more of two": ((1, 2, 3, 4), 5, 2)}


def kill_at_every_change(directory: Path, before: tuple[int, ...], step: int, keep: int) -> tuple[list[int], list[int]]:
    """The latest step after a kill before each change; and after the next writer's save on top of that."""
    former = max(before, default=0)
    found, then = [], []
    template = directory / "template"
    template.mkdir()
    for earlier in before:
        save_step(template, earlier)
    for number in itertools.count():
        scene = directory / str(number)
        shutil.copytree(template, scene)
        if not killed_before_change(number, scene, lambda scene=scene: save_step(scene, step, keep)):  # type: ignore[misc]
            break
        found.append(latest_step(scene))
        save_step(scene, step + 1, keep=1)
        then.append(latest_step(scene))
        assert [p.name for p in scene.iterdir()] == [f"step_{step + 1:08d}"], "leftovers are cleared away"
        shutil.rmtree(scene)
    assert former not in then
    return found, then


@pytest.mark.parametrize(("before", "step", "keep"), SCENES.values(), ids=SCENES)
def test_killed_before_any_change_the_former_or_the_new_one_is_whole(
    before: tuple[int, ...], step: int, keep: int, tmp_path: Path, alone: ProcessPoolExecutor
) -> None:
    found, then = alone.submit(kill_at_every_change, tmp_path, before, step, keep).result()
    former = max(before, default=0)
    assert len(found) > 12
    assert found == sorted(found), "once the new one is there, it stays"
    assert set(found) == {former, step}
    assert found.count(former) >= 12, "most of it comes before the new one is published"
    assert set(then) == {step + 1}


def kill_saving_again(directory: Path) -> list[float]:
    """What the one checkpoint holds, 4 or 40, after a kill before each change of saving it again."""
    found = []
    for number in itertools.count():
        scene = directory / str(number)
        save_tiny(scene, 4)

        def again(scene: Path = scene) -> None:
            save_tiny(scene, 4, 40.0)

        if not killed_before_change(number, scene, again):
            break
        path = latest_checkpoint(scene)
        assert path is not None, f"killed before change {number}: no checkpoint is left"
        step, value = load_tiny(path)
        assert step == 4
        found.append(value)
        save_step(scene, 5, keep=1)
        assert [p.name for p in scene.iterdir()] == ["step_00000005"]
    return found


def test_killed_while_saving_the_only_step_again_one_of_the_two_is_whole(
    tmp_path: Path, alone: ProcessPoolExecutor
) -> None:
    found = alone.submit(kill_saving_again, tmp_path).result()
    assert found == sorted(found)
    assert set(found) == {4.0, 40.0}


def kill_at_random(directory: Path, kills: int, background: bool) -> list[tuple[int, int, list[str]]]:
    """After each kill of a process that saves without end, the last step that it said was saved, the
    latest step that is there, and what else there is."""
    moments = random.Random(0)
    found = []
    for _ in range(kills):
        first = latest_step(directory) + 1
        heard, said = os.pipe()

        def work(first: int = first, said: int = said) -> None:
            checkpoints = Checkpoints(directory, Mesh(), Retention(2), background=background)
            part = tiny(0)
            for step in itertools.count(first):
                part.local.fill_(step)
                for saved in checkpoints.save(step, [part], {}):
                    os.write(said, saved.step.to_bytes(8, "little"))

        child = in_child(work)
        os.close(said)
        os.read(heard, 8)  # it is under way
        time.sleep(moments.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL
        rest = os.read(heard, 1 << 20)
        os.close(heard)
        confirmed = int.from_bytes(rest[-8:], "little") if rest else first
        found.append((confirmed, latest_step(directory), sorted(p.name for p in directory.glob(".*"))))
    return found


@pytest.mark.parametrize("background", [False, True], ids=["at once", "background"])
def test_killed_at_random_moments_what_was_saved_is_there(
    background: bool, tmp_path: Path, alone: ProcessPoolExecutor
) -> None:
    """The latest is the last whose saving had ended, or one after it; its tensor is of that step and no other."""
    found = alone.submit(kill_at_random, tmp_path, 20, background).result()
    assert len(found) == 20
    for confirmed, latest, _ in found:
        assert confirmed <= latest <= confirmed + 1 + background
    assert any(leftovers for *_, leftovers in found), "no kill came while something was being written"
    assert found[-1][0] > found[0][0]
