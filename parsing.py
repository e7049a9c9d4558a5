"""Reading the options of a verb: flags come from signatures and dataclasses, and what is wrong comes as one line."""

import contextlib
import inspect
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import tyro


def parse(options: Callable[..., Any], verb: str, described: Any, arguments: Sequence[str]) -> Any:
    """Read the options of a verb.

    Args:
        options: a function or a dataclass, whose parameters are the flags.
        verb: what was called, for the help.
        described: whose docstring describes it.
        arguments: what was given.

    Raises:
        ValueError: if they cannot be read; what tyro says of it, as one line.
    """
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(options, prog=f"claritycore {verb}", description=described.__doc__, args=arguments)
    except SystemExit as exit_:
        if not exit_.code:
            raise
        unframed = re.sub(
            r"[╭╮╰╯─]|\+(?=-)|(?<=-)\+|-{3,}|^ *[│|]|[│|] *$", " ", message.getvalue(), flags=re.MULTILINE
        )
        message = " ".join(unframed.split("For full helptext")[0].split())
        message = re.sub(r"^((Value|Parsing) error|(Unrecognized|Required) options(?= \w)) ?", "", message)
        message = re.sub(r"Error parsing \w+: ", "", message)
        raise ValueError(f"{message}; see claritycore {verb} --help") from None


def taken(arguments: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """Take all values of a flag out of the arguments; return these values and the other arguments.

    Raises:
        ValueError: if the flag comes without a value.

    >>> taken(["train", "--config", "a.toml", "--steps", "5", "--config=b.toml"], "--config")
    (['a.toml', 'b.toml'], ['train', '--steps', '5'])
    """
    values: list[str] = []
    rest: list[str] = []
    given = iter(arguments)
    for argument in given:
        if argument == flag:
            value = next(given, None)
            if value is None:
                raise ValueError(f"{flag} needs a value")
            values.append(value)
        elif argument.startswith(f"{flag}="):
            values.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    return values, rest


def no_options() -> None:
    """The options of a verb that has none."""


def first_line(documented: Any) -> str:
    """What a docstring says in its first line, without formulas."""
    words, formula, _ = inspect.cleandoc(documented.__doc__ or "").split("\n")[0].partition(":math:")
    return f"{words.rstrip(' ,:')}." if formula else words
