"""Looking at nets, running them and exporting them: costs, tiles, files for other runtimes."""

from .doctor import diagnose
from .ensemble import SelfEnsemble
from .export import export
from .export_report import ExportReport
from .flops import flop_formulas, fvcore_handles
from .restore import restore_picture
from .restore_files import RestoreReport, restore_files
from .restore_options import RestoreOptions
from .summary import Summary, summarize
from .tile import restore_tiled

__all__ = [
    "ExportReport",
    "RestoreOptions",
    "RestoreReport",
    "SelfEnsemble",
    "Summary",
    "diagnose",
    "export",
    "flop_formulas",
    "fvcore_handles",
    "restore_files",
    "restore_picture",
    "restore_tiled",
    "summarize",
]
