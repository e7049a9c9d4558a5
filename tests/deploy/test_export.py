"""Exported files: each format at sizes other than the traced one, what reports say, and a net that stays as it was."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from claritycore.blocks import FreqSplit2d
from claritycore.deploy import ExportReport, export
from claritycore.deploy.export_limits import limits
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


def run_onnx(path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path))
    return torch.from_numpy(session.run(["restored"], {"image": x.numpy()})[0])


def run_program(path, x: torch.Tensor) -> torch.Tensor:
    return torch.export.load(path).module()(x)


def run_weights(path, x: torch.Tensor) -> torch.Tensor:
    return AutoModel.from_pretrained(path).eval()(x)


RUN = {"onnx": run_onnx, "pt2": run_program, "safetensors": run_weights}
ALL_OPEN = {"batch": "1 and up", "height": "1 and up", "width": "1 and up"}


@pytest.mark.parametrize("ending", RUN)
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
    for size in [(1, 7, 9), (3, 20, 1)]:
        x = image(*size, channels=net.in_channels)
        with torch.no_grad():
            expected, actual = net(x), RUN[ending](report.path, x)
        assert actual.shape[2:] == (size[1] * scale, size[2] * scale)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
@pytest.mark.parametrize("scale", [1, 2])
def test_the_crop_of_an_unshuffling_stem_leaves_sizes_open(scale, ending, tmp_path):
    net = rrdbnet(scale=scale, upsampler="nearest+conv").eval()
    report = export(net, tmp_path / f"net.{ending}")
    least = {1: "5 and up", 2: "3 and up"}[scale]
    assert report.dynamic == {"batch": "1 and up", "height": least, "width": least}
    assert not any("only where" in note for note in report.notes)
    for size in [(1, 5, 7), (2, 40, 41), (1, 16, 24)]:
        with torch.no_grad():
            torch.testing.assert_close(RUN[ending](report.path, image(*size)), net(image(*size)), rtol=1e-5, atol=1e-6)


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
    net = plksr(num_feat=16)
    whole, half = (export(net, tmp_path / f"{name}.{ending}", dtype=name) for name in ("float32", dtype))
    assert half.dtype == dtype
    assert half.file_size < whole.file_size
    assert 1e-5 < max(check.relative_error for check in half.checks) < largest
    if ending == "onnx":
        x = image(1, 9, 8).half()
        assert run_onnx(half.path, x).dtype == torch.float16


def test_wide_depthwise_kernels_in_half_precision_return(tmp_path):
    report = export(plksr(form="depthwise", kernel_size=17, scale=1), tmp_path / "net.pt2", dtype="float16")
    assert any("import claritycore.kernels" in note for note in report.notes)


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_static_file_says_so(ending, tmp_path):
    net = span(scale=2).eval()
    report = export(net, tmp_path / f"net.{ending}", static=True, size=(10, 12))
    assert report.dynamic == {}
    assert report.static == {"batch": "1, asked for", "height": "10, asked for", "width": "12, asked for"}
    assert [check.size for check in report.checks] == [(1, 3, 10, 12)]
    x = image(1, 10, 12)
    with torch.no_grad():
        torch.testing.assert_close(RUN[ending](report.path, x), net(x), rtol=1e-4, atol=1e-4)


class Halved(nn.Module):
    """Takes another way where the height is no multiple of 4."""

    def forward(self, image):
        return image * 2 if image.shape[2] % 4 else image * 3


class Turned(nn.Module):
    def forward(self, image):
        return image + image.mT


class Rows(nn.Module):
    """A weight for each of 48 rows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(48, 1))

    def forward(self, image):
        return image * self.weight


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_what_a_net_does_with_sizes_is_told(ending, tmp_path):
    def told(net, **options):
        return export(net, tmp_path / f"net.{ending}", overwrite=True, **options)

    halved = told(Halved())
    assert halved.notes == ("holds only where height % 4 == 0",)
    assert all(check.size[2] % 4 == 0 for check in halved.checks)
    turned = told(Turned(), size=(20, 20))
    assert turned.dynamic == {"batch": "1 and up", "height": "1 and up", "width": "equal to the height"}
    rows = told(Rows())
    assert rows.static == {"height": "48, fixed by what the net computes"}
    assert list(rows.dynamic) == ["batch", "width"]
    one = told(span(), size=(1, 20))
    assert one.static == {"height": "1, as torch takes a traced 1 for the only size"}


def test_an_onnx_file_names_its_sizes_and_its_net(tmp_path):
    net = plksr(scale=2)
    model = onnx.load(export(net, tmp_path / "net.onnx").path)
    shapes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    ]
    assert shapes == [["batch", 3, "height", "width"], ["batch", 3, "2*height", "2*width"]]
    facts = {entry.key.removeprefix("claritycore."): entry.value for entry in model.metadata_props}
    assert json.loads(facts["config"]) == json.loads(json.dumps(net.config.to_dict()))
    assert (facts["net"], facts["model_type"], facts["scale"]) == ("PLKSR", "plksr", "2")
    assert (facts["tile_safe"], facts["receptive_radius"]) == ("true", str(net.receptive_radius))


def test_large_weights_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("claritycore.deploy.export_onnx.MOST_INSIDE", 1000)
    net = span().eval()
    report = export(net, tmp_path / "net.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert report.file_size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert report.notes == ("its weights are in net.onnx.data, beside it",)
    x = image(1, 6, 5)
    with torch.no_grad():
        np.testing.assert_allclose(run_onnx(report.path, x), net(x), rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    export(net, report.path, overwrite=True)
    assert list(tmp_path.iterdir()) == [report.path], "the weights of the file before are still there"


class Low(nn.Module):
    def __init__(self):
        super().__init__()
        self.split = FreqSplit2d(3)

    def forward(self, image):
        return self.split(image).low


def test_what_runtimes_lack_is_told_with_the_switch(tmp_path):
    net = Low()
    report = export(net, tmp_path / "net.onnx", static=True, size=(8, 10))
    assert report.ops["DFT"]
    assert any("DFT" in note and "export_form('dct') or ('blur') replaces split" in note for note in report.notes)
    assert limits(["Scan"], net)[0].startswith("Scan: ")
    net.split = net.split.export_form("dct")
    report = export(net, tmp_path / "net.onnx", size=(8, 10), overwrite=True)
    assert "DFT" not in report.ops
    assert list(report.dynamic) == ["batch", "height", "width"]


def test_a_report_is_a_line_per_fact(tmp_path):
    report = export(span(), tmp_path / "net.safetensors")
    assert isinstance(report, ExportReport)
    lines = str(report).splitlines()
    assert lines[0] == str(tmp_path / "net.safetensors")
    assert lines[1] == f"  format      safetensors, float32, {report.file_size:,} bytes"
    assert [line.split()[0] for line in lines[1:]] == ["format", "dynamic", "static", "checked", "checked"]
