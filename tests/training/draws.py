"""Judging what was drawn."""

import numpy as np
from scipy import stats


def fills(values, low, high):
    """Whether values fill a range evenly up to its ends: by chance one in thousands of such tests fails."""
    values, room = np.asarray(values, dtype=np.float64), 12 / len(values) * (high - low)
    ends = low - 1e-6 <= values.min() <= low + room and high - room <= values.max() <= high + 1e-6
    return ends and stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-4
