"""Settings of every test: hypothesis profiles, one thread a worker, and where the Triton kernels run."""

import gc
import os

import pytest
import torch
from hypothesis import settings

import claritycore.training.presets  # noqa: F401 - registers ours, before the first test
from claritycore.nets import registry

# Without a CUDA device Triton kernels are interpreted; triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Inductor would start a pool of compilers in each worker, which takes longer than what there is to compile.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

torch.set_num_threads(1)

# What torch traces by are objects by the million: to look through all that live for garbage as often as Python does by
# itself takes an eighth of the time.
gc.set_threshold(10_000, 20, 50)

settings.register_profile("committed", deadline=None, derandomize=True, max_examples=10)
settings.register_profile("nightly", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "committed"))


@pytest.fixture(autouse=True)
def registrations_end_with_the_test(monkeypatch):
    for name in ("_NETS", "_PRESETS"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
