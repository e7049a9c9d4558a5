"""What the doctor says of a machine."""

import pytest
import torch

from claritycore.deploy import diagnose
from claritycore.kernels import KERNELS


def rows(report: str) -> dict[str, list[str]]:
    """The table: kernel to [device, backend, reason]."""
    table = report.split("why\n", 1)[1]
    return {line.split()[0]: line.split(maxsplit=3)[1:] for line in table.splitlines() if line.split()[1] == "cpu"}


def test_it_names_versions_and_every_kernel(monkeypatch):
    monkeypatch.delenv("CLARITYCORE_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    report = diagnose()
    assert f"torch        {torch.__version__}" in report
    table = rows(report)
    assert set(table) == {kernel.name for kernel in KERNELS} >= {"selective_scan", "selective_scan_2d"}
    for device, backend, why in table.values():
        assert (device, backend) == ("cpu", "torch")
        assert "Triton needs CUDA" in why or "not installed" in why


@pytest.mark.parametrize(
    ("variable", "backend", "why"),
    [
        ("reference", "reference", "CLARITYCORE_BACKEND asks for reference"),
        ("triton", "none", "selective_scan cannot run with backend='triton'"),
        ("fast", "none", "CLARITYCORE_BACKEND must be one of"),
    ],
)
def test_it_says_what_the_variable_does(monkeypatch, variable, backend, why):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CLARITYCORE_BACKEND", variable)
    row = rows(diagnose())["selective_scan"]
    assert row[1] == backend
    assert row[2].startswith(why)


def test_it_says_that_triton_is_missing(monkeypatch):
    monkeypatch.delenv("CLARITYCORE_BACKEND", raising=False)
    monkeypatch.setattr("claritycore.kernels.dispatch.HAS_TRITON", False)
    assert "triton is not installed" in rows(diagnose())["selective_scan"][2]
