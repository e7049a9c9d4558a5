"""What this machine can run: versions, devices, and the form that each kernel takes here."""

import importlib.metadata
import os
import platform

import torch

from .. import __version__
from ..kernels import KERNELS
from ..kernels.dispatch import VARIABLE


def diagnose() -> str:
    """Describe the machine and say which backend each kernel would use on it, and why.

    >>> diagnose().splitlines()[0].startswith("claritycore")
    True
    """
    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    lines = [
        f"claritycore  {__version__}",
        f"python       {platform.python_version()} on {platform.platform()}",
        f"torch        {torch.__version__}",
        f"triton       {_version('triton')}",
        f"devices      {', '.join(['cpu', *devices])}",
        f"{VARIABLE}  {os.environ.get(VARIABLE, 'not set: each call decides by its device')}",
        "",
        f"{'kernel':<28}{'device':<8}{'backend':<12}why",
    ]
    for kernel in KERNELS:
        for kind in ["cpu", *(["cuda"] if devices else [])]:
            chosen, why = kernel.explain(torch.device(kind))
            lines.append(f"{kernel.name:<28}{kind:<8}{chosen:<12}{why}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
