"""Where a config of one's own finds its base."""

from ..nets import BaseConfig

__all__ = ["BaseConfig"]
