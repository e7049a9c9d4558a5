"""How kernel tests run: memory filled with NaN, Triton interpreted where there is no CUDA device."""

import importlib.util

import numpy as np
import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


def pytest_runtest_setup(item):
    if "triton" in item.name and not HAS_TRITON:
        pytest.skip("triton is not installed")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """An element that a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills empty, empty_like and new_empty with NaN
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton forms run: a CUDA device, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def faithful_interpreter():
    """Mend Triton 3.6's: `range` of a number fails with numpy 2.4, and bfloat16 is cut where a GPU rounds."""
    if not HAS_TRITON or torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    patch, trunc = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_fp_trunc

    def patch_with_numbers(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def round_to_nearest(builder, source, target):
        if not target.scalar.is_bf16():
            return trunc(builder, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, target.scalar)

    interpreter._patch_lang_tensor = patch_with_numbers
    interpreter.InterpreterBuilder.create_fp_trunc = round_to_nearest
    yield
    interpreter._patch_lang_tensor = patch
    interpreter.InterpreterBuilder.create_fp_trunc = trunc
