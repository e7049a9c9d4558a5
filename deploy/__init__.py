"""Looking at nets and running them: costs, and what the machine can do."""

from .doctor import diagnose
from .flops import flop_formulas, fvcore_handles
from .summary import Summary, summarize

__all__ = ["Summary", "diagnose", "flop_formulas", "fvcore_handles", "summarize"]
