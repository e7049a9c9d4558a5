"""What a run tells: lines of JSON, TensorBoard where it is installed, and one line on a terminal."""

import importlib.util
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..deploy.progress import ProgressLine
from ..nets.checkpoints import write_whole

LOG = "log.jsonl"
SECONDS_BETWEEN_LINES = 60.0


class Journal:
    """Writes what happens in a run.

    What an earlier go at the run wrote after the checkpoint from which this one goes on is dropped: those steps are
    made, and written down, again.

    Args:
        folder: of the run.
        steps: of the whole run.
        line: a line on the terminal that follows the run; where there is no terminal, `tell` follows once a minute.
        tell: called with a line for the log of whoever started the run.
        first_step: how many steps were made before.
        silent: tell nothing: another process does.

    >>> Journal.duration(3725)
    '1:02:05'
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        line: ProgressLine | None = None,
        tell: Callable[[str], None] = lambda text: None,
        *,
        first_step: int = 0,
        silent: bool = False,
    ) -> None:
        self.folder, self.steps, self.line, self.tell, self.silent = folder, steps, line, tell, silent
        self.first_step = first_step
        self.board: Any = None
        if not silent:
            _keep_until(first_step, folder / LOG)
            if importlib.util.find_spec("tensorboard") is not None:
                from torch.utils.tensorboard.writer import SummaryWriter

                self.board = SummaryWriter(folder, purge_step=first_step + 1)
        self.start()

    def start(self) -> None:
        """Begin to measure the pace."""
        self._begun = self._due = time.perf_counter()

    def follow(self, step: int, loss: float) -> None:
        """Say how far the run is, and when it will be done."""
        if self.silent or self.line is None:
            return
        now = time.perf_counter()
        left = self.duration((now - self._begun) / (step - self.first_step) * (self.steps - step))
        text = f"step {step} of {self.steps}, loss {loss:.4g}, {left} left"
        if self.line.live:
            self.line.show(text)
        elif now >= self._due:
            self._due = now + SECONDS_BETWEEN_LINES
            self.tell(text)

    def write(self, step: int, **values: Any) -> None:
        """Add a line to the log, and its numbers to TensorBoard."""
        if self.silent:
            return
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            # JSON has no infinity, which is the PSNR of equal images.
            told = {key: None if value in (math.inf, -math.inf) else value for key, value in values.items()}
            file.write(json.dumps({"step": step, **told}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """Show an image (C, H, W) in [0, 1] in TensorBoard."""
        if self.board is not None:
            self.board.add_image(name, image.clamp(0, 1), step)

    def close(self) -> None:
        if self.line is not None:
            self.line.clear()
        if self.board is not None:
            self.board.close()

    @staticmethod
    def duration(seconds: float) -> str:
        """Hours, minutes and seconds."""
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _keep_until(step: int, log: Path) -> None:
    """Drop the lines of a log that are of later steps, and one that a killed process left unfinished."""
    if not log.exists():
        return
    lines = log.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines):
        write_whole(log, b"".join(kept))


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except ValueError:
        return math.inf
