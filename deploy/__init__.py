"""Looking at nets and running them: costs, and what the machine can do."""

from .doctor import diagnose
from .ensemble import SelfEnsemble
from .flops import flop_formulas, fvcore_handles
from .restore import restore_picture
from .restore_files import RestoreReport, restore_files
from .restore_options import RestoreOptions
from .summary import Summary, summarize
from .tile import restore_tiled

__all__ = [
    "RestoreOptions",
    "RestoreReport",
    "SelfEnsemble",
    "Summary",
    "diagnose",
    "flop_formulas",
    "fvcore_handles",
    "restore_files",
    "restore_picture",
    "restore_tiled",
    "summarize",
]
