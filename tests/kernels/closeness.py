"""How close the forms of a kernel come to the truth, relative to its largest value."""

import torch

CPU = torch.device("cpu")
OUTPUT_ERROR, GRADIENT_ERROR = 2e-6, 1e-5
"""Allowed in float32, of values that are sums of products."""


def error(result, truth):
    """The largest difference, relative to the largest value of the truth."""
    result, truth = result.cpu().double(), truth.cpu().double()
    assert result.shape == truth.shape
    return ((result - truth).abs().max() / truth.abs().max().clamp_min(1e-300)).item() if truth.numel() else 0.0


def assert_close(results, truths, output_error=OUTPUT_ERROR, gradient_error=GRADIENT_ERROR):
    assert results.keys() == truths.keys()
    errors = {name: error(results[name], truth) for name, truth in truths.items()}
    allowed = {name: gradient_error if name.startswith("gradient") else output_error for name in truths}
    wrong = {name: value for name, value in errors.items() if not value <= allowed[name]}
    assert not wrong
