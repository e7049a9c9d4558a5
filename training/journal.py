"""What a run tells: lines of JSON, TensorBoard where it is installed, and one line on a terminal."""

import importlib.util
import json
import math
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from ..deploy.progress import ProgressLine

LOG = "log.jsonl"


class Journal:
    """Writes what happens in a run.

    Args:
        folder: of the run.
        steps: of the whole run.
        line: a line on the terminal that follows the run.
        silent: tell nothing: another process does.

    >>> Journal.duration(3725)
    '1:02:05'
    """

    def __init__(self, folder: Path, steps: int, line: ProgressLine | None = None, *, silent: bool = False) -> None:
        self.folder, self.steps, self.line, self.silent = folder, steps, line, silent
        self.board: Any = None
        if not silent and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self.board = SummaryWriter(folder)
        self._mark = time.perf_counter(), 0

    def start(self, step: int) -> None:
        """Begin to measure the pace."""
        self._mark = time.perf_counter(), step

    def follow(self, step: int, loss: float) -> None:
        """Say on the terminal how far the run is, and when it will be done."""
        if self.silent or self.line is None:
            return
        seconds, since = time.perf_counter() - self._mark[0], step - self._mark[1]
        left = self.duration(seconds / since * (self.steps - step)) if since else "?"
        self.line.show(f"step {step} of {self.steps}, loss {loss:.4g}, {left} left")

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
