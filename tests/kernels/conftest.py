"""Kernel tests run on memory filled with NaN: an element that a kernel forgets to write shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills empty, empty_like and new_empty with NaN
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton forms run: a CUDA device, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
