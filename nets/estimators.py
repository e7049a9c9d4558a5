"""Files of `DegradationEstimator`s: safetensors with what they were made from in the metadata."""

from os import PathLike
from pathlib import Path

from ..blocks import DegradationEstimator
from .checkpoints import Checkpoint, check_weights, read_checkpoint, write_checkpoint

MODEL_TYPE = "degradation-estimator"


def save_estimator(estimator: DegradationEstimator, path: str | PathLike[str]) -> Path:
    """Write weights and sizes to a .safetensors file, or into a folder; return the path of the file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_estimator(DegradationEstimator(1, widths=(4, 8)), folder)
    ...     load_estimator(path).in_channels
    1
    """
    widths = [conv.out_channels for conv in estimator.convs]
    config = {"in_channels": estimator.in_channels, "widths": widths, "hidden": estimator.hidden.out_features}
    return write_checkpoint(path, Checkpoint(estimator.state_dict(), MODEL_TYPE, config))


def load_estimator(path: str | PathLike[str]) -> DegradationEstimator:
    """Load what `save_estimator` wrote, in eval mode.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or holds no estimator.

    >>> load_estimator("nowhere.safetensors")
    Traceback (most recent call last):
    FileNotFoundError: there is no checkpoint nowhere.safetensors
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.model_type != MODEL_TYPE:
        raise ValueError(f"{path} must be a file of save_estimator, it is one of {checkpoint.model_type or 'a net'}")
    estimator = DegradationEstimator(**checkpoint.config)
    check_weights(estimator, checkpoint.state, path)
    estimator.load_state_dict(checkpoint.state)
    return estimator.eval()
