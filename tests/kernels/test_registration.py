"""Operators may be registered anew, as when a notebook loads the package once more."""

import subprocess
import sys

import torch

from claritycore.kernels.registration import Operator


def test_an_operator_takes_the_place_of_one_of_the_same_name():
    x = torch.ones(2, requires_grad=True)
    for factor in (2.0, 3.0):

        def times(x: torch.Tensor, factor: float = factor) -> torch.Tensor:
            return factor * x

        op = Operator("times", times)
        op.register_fake(lambda x, *_: torch.empty_like(x))
        op.register_autograd(lambda ctx, grad, factor=factor: (factor * grad, None))
        op.register_vmap(lambda info, dims, x, *rest, op=op: (op(x, *rest), dims[0]))
        op.register_autocast()
        y = op(x)
        assert y.tolist() == [factor, factor]
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [factor, factor]
        assert torch.ops.claritycore.times(torch.ones(1, device="meta")).shape == (1,)
        assert torch.vmap(op)(torch.ones(2)).tolist() == [factor, factor]
        with torch.autocast("cpu"):
            assert op(x).tolist() == [factor, factor]


def test_the_package_can_be_imported_twice():
    code = """
import importlib, sys
import claritycore.blocks, claritycore.kernels.expert_routing.op as op
importlib.reload(op)
for name in [name for name in sys.modules if name.startswith("claritycore")]:
    del sys.modules[name]
import torch, claritycore.blocks as again
x = torch.randn(1, 8, 5, 7, requires_grad=True)
again.MoE2d(8, [again.PointwiseExpert(8), again.PointwiseExpert(8)], k=1)(x)[0].sum().backward()
assert x.grad.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
