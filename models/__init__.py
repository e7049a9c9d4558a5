"""The import paths `claritycore.models`, `.base` and `.auto`: names of `claritycore.nets`, and nothing else."""

from ..nets import *  # noqa: F403 - the very names, by nets.__all__
from ..nets import __all__ as __all__
