"""Which form of a kernel runs: Triton on CUDA tensors where it is installed, plain torch elsewhere."""

import importlib
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backend = Literal["auto", "triton", "torch", "reference"]
BACKENDS = get_args(Backend)

VARIABLE = "CLARITYCORE_BACKEND"

HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked once: torch.compile cannot trace the question


@dataclass(frozen=True)
class Kernel:
    """What one op family offers, and the rule by which a call picks its form.

    Args:
        name: the public name of the op, and of its folder.
        backends: the forms that exist, of "triton", "torch" and "reference". Where "torch" is missing the reference
            is already fast, and takes its place.

    >>> Kernel("some_op").choose("torch", torch.empty(0))
    'torch'
    """

    name: str
    backends: tuple[Backend, ...] = ("triton", "torch", "reference")

    def explain(self, device: torch.device) -> tuple[str, str]:
        """Say which form a call with backend="auto" takes on `device`, and why."""
        wanted = os.environ.get(VARIABLE, "auto")
        try:
            chosen = self.choose("auto", torch.empty(0, device=device))
        except (ValueError, NotImplementedError) as error:
            return "none", str(error)
        if wanted != "auto":
            return chosen, f"{VARIABLE} asks for {wanted}"
        if chosen != "triton" and not self.why_not("triton", device):
            return chosen, "Triton's interpreter, which TRITON_INTERPRET asks for, runs only where a call names it"
        return chosen, self.why_not("triton", device) or "Triton can run"

    def choose(self, backend: Backend, tensor: Tensor, *others: Tensor | None) -> Backend:
        """Resolve `backend` for a call of these tensors, which lie where the first lies.

        "auto" obeys the environment variable CLARITYCORE_BACKEND, then takes Triton on CUDA tensors where it is
        installed and plain torch elsewhere. A backend that is named, here or there, runs or raises.

        Raises:
            ValueError: if no backend has that name.
            NotImplementedError: (a RuntimeError) if a named backend cannot run here; the message says why.
            RuntimeError: if a tensor carries a tangent of forward-mode differentiation, which the reference alone has.
        """
        form = self._form_of(backend, tensor)
        if form != "reference" and any(map(_has_tangent, (tensor, *others))):
            raise RuntimeError(f'{self.name} can be differentiated in forward mode only with backend="reference"')
        return form

    def _form_of(self, backend: Backend, tensor: Tensor) -> Backend:
        wanted = cast(Backend, os.environ.get(VARIABLE, "auto") if backend == "auto" else backend)
        if wanted not in BACKENDS:
            source = VARIABLE if backend == "auto" else "backend"
            raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {wanted!r}")
        if wanted == "auto":
            fast = tensor.is_cuda and not self.why_not("triton", tensor.device)
            return "triton" if fast else self._plain()
        if reason := self.why_not(wanted, tensor.device):
            raise NotImplementedError(f"{self.name} cannot run with backend={wanted!r}: {reason}")
        return self._plain() if wanted == "torch" else wanted

    def form(self, backend: str) -> ModuleType:
        """Import the form of a backend that was chosen, `fallback` or `fused`: the only path to Triton."""
        file = {"torch": "fallback", "triton": "fused"}[backend]
        return importlib.import_module(f".{self.name}.{file}", __package__)

    def why_not(self, backend: Backend, device: torch.device) -> str:
        """Say what keeps `backend` from running on `device`; empty if nothing does."""
        if backend != "triton":
            return ""
        if "triton" not in self.backends:
            return "it has no Triton form"
        if not HAS_TRITON:
            return "triton is not installed (torch's CUDA and ROCm wheels bring it)"
        if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            return ""
        return f"its tensors are on {device.type}; Triton needs CUDA tensors"

    def _plain(self) -> Backend:
        return "torch" if "torch" in self.backends else "reference"


def _has_tangent(x: Tensor | None) -> bool:
    """Whether forward-mode differentiation follows a tensor; an operator would drop it without a word."""
    if x is None or torch.compiler.is_compiling():
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def processors(device: torch.device) -> int:
    """Count the multiprocessors of a GPU; the interpreter is one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
