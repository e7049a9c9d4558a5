"""What the doctor says of a machine."""

import torch

from claritycore.deploy import diagnose
from claritycore.kernels import KERNELS


def test_it_names_versions_devices_and_every_kernel(monkeypatch):
    monkeypatch.delenv("CLARITYCORE_BACKEND", raising=False)
    report = diagnose()
    assert f"torch        {torch.__version__}" in report
    rows = [line.split() for line in report.splitlines()]
    for kernel in KERNELS:
        assert [kernel.name, "cpu"] in [row[:2] for row in rows]


def test_it_says_why_triton_does_not_run(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "triton" in diagnose()
