"""What is said on a terminal: lines that stay, and one that follows the work."""

import shutil
from typing import TextIO


class ProgressLine:
    """Rewrite one line of a terminal in place; on anything else say nothing.

    Args:
        stream: where to write.

    >>> import sys
    >>> ProgressLine(sys.stdout).show("is no terminal here")
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.live = stream, stream.isatty()

    def show(self, text: str) -> None:
        """Replace the line."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r\033[K{text if len(text) <= width else '...' + text[3 - width :]}")
            self.stream.flush()

    def clear(self) -> None:
        """Take the line away, for something that stays."""
        self.show("")


def one_line(text: object) -> str:
    r"""Give a text as one line that does nothing to a terminal, whatever a file is called.

    >>> one_line("first\tsecond")
    'first second'
    """
    return "".join(letter if letter.isprintable() else " " for letter in str(text)).strip()
