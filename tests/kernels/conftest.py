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
    """Mend Triton 3.6's: `range` of a number fails with numpy 2.4, and bfloat16 is cut where a GPU rounds.

    And products of matrices take the bits of bfloat16 for integers.
    """
    if not HAS_TRITON or torch.cuda.is_available():
        yield
        return
    import triton
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    patch, trunc, dot = interpreter._patch_lang_tensor, builder.create_fp_trunc, builder.create_dot

    def patch_with_numbers(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def round_to_nearest(builder, source, target):
        if not target.scalar.is_bf16():
            return trunc(builder, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, target.scalar)

    def dot_of_floats(builder, a, b, *rest):
        if a.dtype.scalar.is_bf16():
            a, b = (builder.create_fp_ext(x, triton.language.float32) for x in (a, b))
        return dot(builder, a, b, *rest)

    interpreter._patch_lang_tensor = patch_with_numbers
    builder.create_fp_trunc, builder.create_dot = round_to_nearest, dot_of_floats
    yield
    interpreter._patch_lang_tensor = patch
    builder.create_fp_trunc, builder.create_dot = trunc, dot
