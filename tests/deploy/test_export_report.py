"""What `export` says of a file: which sizes stay open and why not, names and facts in it, what runtimes lack."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from claritycore.blocks import FreqSplit2d
from claritycore.deploy import ExportReport, export
from claritycore.deploy.export_limits import limits
from tests.deploy.test_export import LOAD, image, load_onnx, plksr, span

onnx = pytest.importorskip("onnx")


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_static_file_says_so(ending, tmp_path):
    net = span(scale=2).eval()
    report = export(net, tmp_path / f"net.{ending}", static=True, size=(10, 12))
    assert report.dynamic == {}
    assert report.static == {"batch": "1, asked for", "height": "10, asked for", "width": "12, asked for"}
    assert [check.size for check in report.checks] == [(1, 3, 10, 12)]
    x = image(1, 10, 12)
    with torch.no_grad():
        torch.testing.assert_close(LOAD[ending](report.path)(x), net(x), rtol=1e-4, atol=1e-4)


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
        np.testing.assert_allclose(load_onnx(report.path)(x), net(x), rtol=1e-4, atol=1e-4)
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
