"""Stopping in order: a signal is noted, and the run ends with a checkpoint after the step that is under way."""

import signal
import threading
from types import FrameType
from typing import Any


class Stopped(Exception):
    """A run that was asked to stop has saved itself; raised on every rank after the same step."""


class StopSignal:
    """Notes SIGTERM (a cluster's, and torchrun's to its workers) and SIGINT while it is entered: `with StopSignal()`.

    Ranks get signals at different moments, or only one of them does: that one tells the others in its next step.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # no other may set a handler
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
