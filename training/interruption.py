"""Ctrl-C and SIGTERM in a run: the step under way is finished and saved first."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """A run was asked to stop: it has saved where it stands, and can be resumed.

    Args:
        told: what was saved, and how to go on.
        number: of the signal.

    >>> TrainingInterrupted("saved", signal.SIGTERM).status
    143
    """

    def __init__(self, told: str, number: int) -> None:
        super().__init__(told)
        self.number = number

    @property
    def status(self) -> int:
        """Exit status by the custom of shells."""
        return 128 + self.number


class Interruption:
    """Holds back the first SIGINT or SIGTERM within a `with`; a second one does what it always did.

    Outside the main thread, where Python lets nobody handle signals, it does nothing.

    Args:
        silent: say nothing when one arrives: another process does.

    >>> with Interruption(silent=True) as interruption:
    ...     signal.raise_signal(signal.SIGINT)
    >>> interruption.number == signal.SIGINT
    True
    """

    def __init__(self, *, silent: bool = False) -> None:
        self.silent, self.number = silent, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hold) for number in SIGNALS}
        return self

    def __exit__(self, *raised: object) -> None:
        self._give_back()

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._give_back()
        if not self.silent:
            # Unbuffered: a handler may come in the middle of a print.
            os.write(2, b"\nclaritycore: finishing the step, then saving; once more stops at once\n")

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def leave_signals_to_the_run(worker: int) -> None:
    """Put a worker that decodes images out of reach of what a terminal sends to every process of a run.

    It is not made deaf: the process that started it ends it by SIGTERM.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
