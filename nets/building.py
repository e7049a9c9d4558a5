"""Making the net that a file describes, which may be of any size: no larger than its weights can be for."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

# A deployed block has a few tensors, and was trained with some dozens.
PARAMETERS_A_TENSOR = 100
ANY_NET = 1000


@contextmanager
def built_for(state: Mapping[str, Any], source: str | PathLike[str]) -> Iterator[None]:
    """Nets are made on meta, and only as long as the tensors of a state could be theirs.

    Raises:
        ValueError: if a net gets far more parameters than the state has tensors, or one that is larger than any memory.
    """
    most, made, here = ANY_NET + PARAMETERS_A_TENSOR * len(state), 0, threading.get_ident()

    def count(*_: Any) -> None:
        nonlocal made
        made += threading.get_ident() == here
        if made > most:
            raise RuntimeError(f"it would have more than {most} parameters, for {len(state)} tensors")

    counting = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            yield
    except NotImplementedError:
        raise
    except (RuntimeError, OverflowError, TypeError) as error:  # torch's own go on for pages
        first = str(error).partition("\n")[0]
        raise ValueError(f"{source} describes a net that cannot be made: {first}") from error
    finally:
        counting.remove()
