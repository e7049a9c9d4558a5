"""Exported files: each format at sizes other than the traced one and in half precision; the net stays as it was."""

import copy

import pytest
import torch
from torch import nn

from claritycore.deploy import export
from claritycore.nets import PLKSR, SPAN, AutoModel, PLKSRConfig, RRDBNet, RRDBNetConfig, SPANConfig
from tests.strategies import normal

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def plksr(**fields) -> PLKSR:
    return shaken(PLKSR(PLKSRConfig(**{"num_feat": 8, "num_block": 1, "kernel_size": 5, **fields})))


def span(**fields) -> SPAN:
    return shaken(SPAN(SPANConfig(**{"num_feat": 6, "num_block": 1, **fields})))


def rrdbnet(**fields) -> RRDBNet:
    return shaken(RRDBNet(RRDBNetConfig(**{"num_feat": 4, "num_block": 1, "num_grow_ch": 2, **fields})))


def shaken(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net


def image(*size: int, channels: int = 3) -> torch.Tensor:
    return normal((size[0], channels, *size[1:])).sigmoid()


def load_onnx(path):
    session = onnxruntime.InferenceSession(str(path))
    return lambda x: torch.from_numpy(session.run(["restored"], {"image": x.numpy()})[0])


def load_program(path):
    return torch.export.load(path).module()


def load_weights(path):
    return AutoModel.from_pretrained(path).eval()


LOAD = {"onnx": load_onnx, "pt2": load_program, "safetensors": load_weights}
ALL_OPEN = {"batch": "1 and up", "height": "1 and up", "width": "1 and up"}


@pytest.mark.parametrize("ending", LOAD)
@pytest.mark.parametrize(
    ("net", "scale"),
    [
        (plksr(scale=3, in_channels=1, out_channels=1), 3),
        (plksr(form="dilated", branches=("5x5", "3x3@2"), norm="layer", scale=2), 2),
        (span(scale=4, in_channels=12, out_channels=2), 4),
        (rrdbnet(scale=1), 1),
    ],
    ids=["plksr", "plksr dilated", "span", "rrdbnet"],
)
def test_a_file_is_the_net_at_other_sizes(net, scale, ending, tmp_path):
    net.train()
    before = copy.deepcopy(net.state_dict())
    report = export(net, tmp_path / f"net.{ending}")
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert report.dynamic == ALL_OPEN
    assert report.static == {}
    assert report.file_size == report.path.stat().st_size
    assert len({check.size for check in report.checks} - {(2, net.in_channels, 48, 64)}) >= 2
    assert all(check.relative_error < 1e-5 for check in report.checks)
    assert list(tmp_path.iterdir()) == [tmp_path / f"net.{ending}"]
    net.eval()
    run = LOAD[ending](report.path)
    for size in [(1, 7, 9), (3, 20, 1)]:
        x = image(*size, channels=net.in_channels)
        with torch.no_grad():
            expected, actual = net(x), run(x)
        assert actual.shape[2:] == (size[1] * scale, size[2] * scale)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("scale", "ending"), [(1, "onnx"), (2, "pt2")])
def test_the_crop_of_an_unshuffling_stem_leaves_sizes_open(scale, ending, tmp_path):
    net = rrdbnet(scale=scale, upsampler="nearest+conv").eval()
    report = export(net, tmp_path / f"net.{ending}")
    least = {1: "5 and up", 2: "3 and up"}[scale]
    assert report.dynamic == {"batch": "1 and up", "height": least, "width": least}
    assert not any("only where" in note for note in report.notes)
    run = LOAD[ending](report.path)
    for size in [(1, 5, 7), (2, 40, 41), (1, 16, 24)]:
        with torch.no_grad():
            torch.testing.assert_close(run(image(*size)), net(image(*size)), rtol=1e-5, atol=1e-6)


def test_fused_weights_load_as_the_deployed_form(tmp_path):
    net = span()
    report = export(net, tmp_path / "span.safetensors")
    loaded = AutoModel.from_pretrained(report.path)
    assert loaded.config == net.config
    assert loaded.conv_first.deployed
    assert not net.conv_first.deployed
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in net.parameters())
    # A file that is deployed already is exported as it is, by its path.
    again = export(report.path, tmp_path / "again.safetensors")
    assert again.path.read_bytes() == report.path.read_bytes()


@pytest.mark.parametrize(
    ("ending", "dtype", "largest"),
    [
        ("onnx", "float16", 5e-3),
        ("pt2", "float16", 5e-3),
        ("pt2", "bfloat16", 5e-2),
        ("safetensors", "float16", 5e-3),
        ("safetensors", "bfloat16", 5e-2),
    ],
)
def test_half_precision(ending, dtype, largest, tmp_path):
    net = span(num_feat=16)
    whole, half = (export(net, tmp_path / f"{name}.{ending}", dtype=name) for name in ("float32", dtype))
    assert half.dtype == dtype
    assert half.file_size < whole.file_size
    assert 1e-5 < max(check.relative_error for check in half.checks) < largest
    if ending == "onnx":
        x = image(1, 9, 8).half()
        assert load_onnx(half.path)(x).dtype == torch.float16


def test_half_precision_that_never_returns_on_a_cpu_does(tmp_path):
    conv = nn.Conv2d(3, 3, 17, padding=8, groups=3)  # torch 2.13 goes on for ever with it in float16
    assert export(conv, tmp_path / "conv.pt2", dtype="float16").checks


def test_a_program_with_kernels_of_ours_says_what_to_import(tmp_path):
    report = export(plksr(form="depthwise", kernel_size=17, scale=1), tmp_path / "net.pt2", dtype="float16")
    assert any("import claritycore.kernels" in note for note in report.notes)
