"""ClarityCore: composable building blocks, kernels and reference nets for image restoration and super-resolution."""

from importlib.metadata import version

__version__ = version("claritycore")
