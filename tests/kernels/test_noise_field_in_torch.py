"""The noise field as torch sees it: compile, export, vmap, autocast, and what it refuses."""

import numpy as np
import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from claritycore.deploy import flop_formulas
from claritycore.kernels import noise_field
from claritycore.kernels.noise_field import noise_field_bytes, noise_field_flops

OP = torch.ops.claritycore.noise_field


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_it_meets_the_rules_of_torch(form, device):
    samples = torch.tensor([0, 5], device=device if form == "triton" else "cpu")
    opcheck(OP, (samples, 2**40, 1, [2, 5], [-1, 3], torch.float32, form))


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_in_one_graph(dynamic):
    def noise(x, samples):
        return x + noise_field(9, x.shape[2:], samples=samples, offset=(1, 2), layer=3, device=x.device)

    compiled = torch.compile(noise, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((2, 3), (5, 6)):
        for samples in (torch.arange(2), [4, 0]):
            x = torch.ones(2, 1, *size)
            assert torch.equal(compiled(x, samples), noise(x, samples))


def test_it_exports_with_any_batch_and_size():
    class Noisy(torch.nn.Module):
        def forward(self, x):
            return x + noise_field(9, x.shape[2:], samples=torch.arange(x.shape[0], device=x.device))

    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(Noisy(), (torch.zeros(2, 3, 4, 6),), dynamic_shapes=(sizes,))
    for shape in ((2, 3, 4, 6), (3, 3, 9, 2)):
        assert torch.equal(program.module()(torch.zeros(shape)), Noisy()(torch.zeros(shape)))


def test_vmap_numbers_samples_by_call():
    samples = torch.tensor([[0, 4], [9, 1], [2, 2]])
    noise = torch.vmap(lambda s: noise_field(5, (3, 4), samples=s))(samples)
    assert torch.equal(noise, torch.stack([noise_field(5, (3, 4), samples=row) for row in samples.tolist()]))


def test_other_dtypes_autocast_meta_and_nothing():
    exact = noise_field(5, (3, 4), samples=[0], dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        noise = noise_field(5, (3, 4), samples=[0], dtype=dtype)
        assert noise.dtype == dtype
        torch.testing.assert_close(noise.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert noise_field(5, (3, 4), samples=[0]).dtype == torch.float32
    assert noise_field(5, (3, 4), samples=[0, 1], device="meta").shape == (2, 1, 3, 4)
    assert noise_field(5, (0, 4), samples=[0, 1]).shape == (2, 1, 0, 4)
    assert noise_field(5, (3, 4), samples=[]).shape == (0, 1, 3, 4)


def test_numbers_of_numpy_are_numbers():
    expected = noise_field(5, (3, 4), samples=[0, 1], layer=2, offset=(1, 6))
    size, offset = (np.int64(3), np.int32(4)), (np.int64(1), np.uint8(6))
    seed, layer = np.random.default_rng(0).integers(5, 6), np.uint32(2)
    assert torch.equal(noise_field(seed, size, samples=np.arange(2), layer=layer, offset=offset), expected)


REFUSED = [
    (lambda: noise_field(-1, (2, 2), samples=[0]), ValueError, r"seed must be .* from 0 to 2\^63 - 1, got -1"),
    (lambda: noise_field(2**63, (2, 2), samples=[0]), ValueError, r"seed must be .* got 9223372036854775808"),
    (lambda: noise_field(1.0, (2, 2), samples=[0]), ValueError, "seed must be an integer .* got 1.0"),
    (lambda: noise_field(1, (2, 2), samples=[-1]), ValueError, r"samples must be .* from 0 to 2\^32 - 1, got -1"),
    (lambda: noise_field(1, (2, 2), samples=torch.zeros(2)), ValueError, r"samples must be .* \(2,\) of torch.float32"),
    (lambda: noise_field(1, (2, 2), samples=[0], layer=2**32), ValueError, "layer must be .* got 4294967296"),
    (lambda: noise_field(1, (2, -2), samples=[0]), ValueError, r"size must be a height and .* got \(2, -2\)"),
    (lambda: noise_field(1, (2, 2, 2), samples=[0]), ValueError, r"size must be a height and .* got \(2, 2, 2\)"),
    (lambda: noise_field(1, (2, 2), samples=[0], offset=(0.5, 0)), ValueError, r"offset must be .* got \(0.5, 0\)"),
    (lambda: noise_field(1, (2, 2), samples=[0], offset=(2**70, 0)), ValueError, r"offset must be .* below 2\^62, got"),
    (lambda: noise_field(1, 5, samples=[0]), ValueError, "size must be a height and a width of at least 0, got 5"),
    (lambda: noise_field(1, (2, 2), samples=3), TypeError, "samples must be a sequence of numbers .* got 3"),
    (lambda: noise_field(1, (2, 2), samples=[0], dtype="half"), TypeError, "dtype must be floating-point, got 'half'"),
    (lambda: noise_field(1, (2, 2), samples=[0], dtype=torch.int64), TypeError, "dtype must be floating-point, got"),
    (lambda: noise_field(1, (2, 2), samples=[0], backend="cuda"), ValueError, "backend must be one of auto, triton"),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_bad_input_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="noise_field cannot run with backend='triton': its tensors are on cpu"):
        noise_field(1, (2, 2), samples=[0], backend="triton")


def test_it_counts_its_work():
    assert noise_field_flops(2, 3, 5) == 5 * 2 * 3 * 5
    assert noise_field_bytes(2, 3, 5, itemsize=2) == 2 * 2 * 3 * 5
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        noise_field(1, (3, 5), samples=[0, 1])
    assert counter.get_total_flops() == noise_field_flops(2, 3, 5)
