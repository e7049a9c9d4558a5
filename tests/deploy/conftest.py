"""Checkpoints of tiny nets, and pictures to restore."""

import functools
import importlib.util
import os

import pytest
import torch

from claritycore.cli import main
from claritycore.images import Picture, write_image
from claritycore.nets import RRDBNet, RRDBNetConfig


@pytest.fixture(autouse=True, scope="session")
def translations_are_read_once():
    """For each export torch reads the signatures of a thousand translations to ONNX, which takes it a second."""
    if importlib.util.find_spec("onnxscript") is None:
        yield
        return
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = functools.cache(ONNXRegistry.from_torchlib)

    def copied(**version):
        whole = read(**version)
        registry = ONNXRegistry()
        registry._opset_version = whole.opset_version
        registry.functions = {name: list(translations) for name, translations in whole.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(copied))
        yield


@pytest.fixture(scope="session")
def make_net():
    """Build a tiny net whose output is near the picture: its values neither vanish nor leave [0, 1] by much."""

    def make(scale=2, channels=3, **fields):
        torch.manual_seed(0)
        sizes = {"num_feat": 4, "num_block": 1, "num_grow_ch": 2, **fields}
        net = RRDBNet(RRDBNetConfig(in_channels=channels, out_channels=channels, scale=scale, **sizes)).eval()
        with torch.no_grad():
            net.conv_last.weight.mul_(3)
            net.conv_last.bias.fill_(0.5)
        return net

    return make


@pytest.fixture(scope="session")
def checkpoint(make_net, tmp_path_factory):
    """The file of a net that enlarges by 2."""
    return make_net().save_pretrained(tmp_path_factory.mktemp("nets") / "x2.safetensors")


@pytest.fixture
def make_picture(tmp_path):
    """Write a picture of random values below the test's folder; returns its path."""

    def make(name, height=6, width=8, *, channels=3, alpha=False, depth=8, seed=0):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = torch.rand(1, channels + alpha, height, width, generator=torch.Generator().manual_seed(seed))
        write_image(path, Picture(values[:, :channels], values[:, channels:] if alpha else None, depth))
        return path

    return make


@pytest.fixture
def run(checkpoint, capsys):
    """Run `claritycore restore` with the net that enlarges by 2; return status, stdout and the lines of stderr."""

    def go(*arguments, model=checkpoint):
        status = main(["restore", "--model", str(model), "--device", "cpu", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err.splitlines()

    return go


@pytest.fixture
def refused(run, tmp_path):
    """Run, and see to it that one line is told, and that nothing below the test's folder has changed."""

    def state():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and os.access(path, os.R_OK)}

    def go(*arguments, **options):
        before = state()
        status, out, err = run(*arguments, **options)
        assert (status, out, len(err)) == (2, "", 1), (out, err)
        assert state() == before
        assert err[0].startswith("claritycore: ")
        return err[0].removeprefix("claritycore: ")

    return go
