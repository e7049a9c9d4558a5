"""What `export` refuses, each with nothing left behind; and engines, by what stands in for TensorRT."""

import os
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from claritycore.deploy import export, export_onnx
from claritycore.deploy.export_tensorrt import profile_for
from tests.deploy.test_export import plksr, rrdbnet, span

onnxruntime = pytest.importorskip("onnxruntime")


def refused(kind, message, *arguments, folder: Path, **options) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(kind, match=message):
        export(*arguments, **options)
    assert sorted(folder.iterdir()) == before, "something was left behind"


def test_bad_arguments(tmp_path):
    def told(kind, message, net, path="net.onnx", **options):
        refused(kind, message, net, tmp_path / path, folder=tmp_path, **options)

    net = span()
    told(
        ValueError, r"net\.trt must end in \.onnx, \.pt2, \.safetensors, \.engine, \.plan; or name the", net, "net.trt"
    )
    told(ValueError, "format must be one of", net, format="onyx")
    told(ValueError, r"must end in \.safetensors", net, "net.bin", format="safetensors")
    told(ValueError, r"must not end in \.onnx", net, format="tensorrt")
    told(ValueError, "dtype must be one of float32, float16, bfloat16, got 'int8'", net, dtype="int8")
    told(ValueError, "dtype must be float32 or float16 for ONNX", net, dtype="bfloat16")
    told(ValueError, "width must be an integer of at least 1, got 0", net, size=(5, 0))
    told(FileNotFoundError, "there is no checkpoint", tmp_path / "nowhere.safetensors")
    told(ValueError, "Sequential takes no image", nn.Sequential(nn.Conv2d(5, 3, 1)))
    told(TypeError, "Two must return an image", Two())
    told(ValueError, "Conv2d must derive from RestorationNet", nn.Conv2d(3, 3, 1), "net.safetensors")
    told(RuntimeError, "Branching cannot be exported", Branching())


class Two(nn.Module):
    def forward(self, image):
        return image, image


class Branching(nn.Module):
    def forward(self, image):
        return image * 3 if image.sum() > 1 else image


def test_a_net_of_nan_has_nothing_to_be_checked_against(tmp_path):
    net = span()
    net.conv_last.bias.data.fill_(torch.nan)
    refused(ValueError, "SPAN gives NaN or infinity", net, tmp_path / "net.safetensors", folder=tmp_path)


def test_places(tmp_path, monkeypatch):
    net = span()
    (tmp_path / "file").write_text("here")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "net.pt2").write_text("mine")
    (tmp_path / "net.onnx").write_text("mine")
    refused(ValueError, "is a file: it cannot hold net.onnx", net, tmp_path / "file" / "net.onnx", folder=tmp_path)
    refused(ValueError, "is a folder", net, tmp_path / "folder.onnx", folder=tmp_path)
    refused(FileExistsError, r"net\.pt2 exists: overwrite=True", net, tmp_path / "net.pt2", folder=tmp_path)
    refused(FileExistsError, r"net\.onnx exists", net, tmp_path / "net.engine", folder=tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(PermissionError, "may not be written to", net, tmp_path / "new.pt2", folder=tmp_path)
    assert (tmp_path / "net.pt2").read_text() == "mine"


def test_folders_are_made_once_the_file_is_whole(tmp_path):
    report = export(span(), tmp_path / "a" / "b" / "net.safetensors")
    assert report.path.is_file()
    with pytest.raises(RuntimeError, match="is not the net"):
        export(span(), tmp_path / "c" / "net.safetensors", tolerance=-1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_format_that_is_named_takes_any_ending(tmp_path):
    assert export(span(), tmp_path / "net.bin", format="torch").format == "torch"
    torch.export.load(tmp_path / "net.bin")


def test_onnx_that_is_not_the_net_is_not_kept(tmp_path, monkeypatch):
    from claritycore.deploy import onnx_ops

    (tmp_path / "net.onnx").write_text("the one before")
    monkeypatch.setattr(onnx_ops, "_depthwise_conv2d", lambda x, *_, **__: onnx_ops.op.Mul(x, x))
    net = plksr(form="depthwise", kernel_size=17)
    message = r"the file of PLKSR is not the net: at 1 x 3 x 33 x 72: largest error .*, more than 1e-04"
    refused(RuntimeError, message, net, tmp_path / "net.onnx", folder=tmp_path, overwrite=True)
    assert (tmp_path / "net.onnx").read_text() == "the one before"


def test_a_fusion_that_is_wrong_is_not_written(tmp_path, monkeypatch):
    from claritycore.blocks import RepConv2d

    fuse = RepConv2d.fused_modules

    def wrongly(block):
        modules = fuse(block)
        for module in modules.values():
            module.bias.data += 0.01
        return modules

    monkeypatch.setattr(RepConv2d, "fused_modules", wrongly)
    for name in ("net.onnx", "net.pt2", "net.safetensors"):
        refused(RuntimeError, "the file of SPAN is not the net", span(), tmp_path / name, folder=tmp_path)


def test_a_result_of_another_size_or_of_nan_is_refused(tmp_path, monkeypatch):
    for result in (lambda y: y[..., 1:], lambda y: y * torch.nan):
        monkeypatch.setattr(export_onnx, "_runner", lambda path, result=result: lambda x: result(span().eval()(x)))
        refused(RuntimeError, "is not the net", span(), tmp_path / "net.onnx", folder=tmp_path)

    def fails(image):
        raise KeyError("no such operator")

    monkeypatch.setattr(export_onnx, "_runner", lambda path: fails)
    refused(
        RuntimeError,
        r"does not run at \(1, 3, 33, 72\): 'no such operator'",
        span(),
        tmp_path / "net.onnx",
        folder=tmp_path,
    )


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_what_installs_it(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"ONNX needs {package}, which is missing: pip install 'claritycore\[export\]'"
    refused(ImportError, message, span(), tmp_path / "net.onnx", folder=tmp_path)


# TensorRT


@pytest.fixture
def no_tensorrt(tmp_path, monkeypatch):
    """As if TensorRT were not installed; a folder of programs."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return programs


def test_without_tensorrt_the_command_is_told(no_tensorrt, tmp_path):
    report = export(span(), tmp_path / "a net.engine", dtype="float16")
    onnx, engine = tmp_path / "a net.onnx", tmp_path / "a net.engine"
    assert (report.path, report.format) == (onnx, "onnx")
    assert onnx.is_file()
    assert not engine.exists()
    assert report.command == (
        f"trtexec '--onnx={onnx}' '--saveEngine={engine}' --minShapes=image:1x3x64x64 --optShapes=image:1x3x256x256 "
        "--maxShapes=image:1x3x1024x1024 --stronglyTyped"
    )
    assert f"  to build    {report.command}" in str(report).splitlines()


def test_a_static_engine_has_no_profile(no_tensorrt, tmp_path):
    report = export(span(), tmp_path / "net.plan", static=True, size=(8, 12))
    assert report.command == f"trtexec --onnx={tmp_path / 'net.onnx'} --saveEngine={tmp_path / 'net.plan'}"


def test_trtexec_builds_the_engine(no_tensorrt, tmp_path):
    script = no_tensorrt / "trtexec"
    script.write_text(
        '#!/bin/sh\nfor word; do case $word in --saveEngine=*) echo "$@" > "${word#--saveEngine=}";; esac; done\n'
    )
    script.chmod(0o755)
    net = rrdbnet(upsampler="nearest+conv", scale=1)  # which takes images of 5 pixels and more
    report = export(net, tmp_path / "net.engine", size=(12, 20))
    assert (report.path, report.format, report.command) == (tmp_path / "net.engine", "tensorrt", None)
    assert (
        "--minShapes=image:1x3x5x5 --optShapes=image:1x3x12x20 --maxShapes=image:1x3x48x80" in report.path.read_text()
    )
    assert (tmp_path / "net.onnx").is_file()
    assert report.notes[-1].startswith("built by trtexec for 1 x 3 x 5 x 5, 1 x 3 x 12 x 20, 1 x 3 x 48 x 80; net.onnx")


def test_a_trtexec_that_fails_leaves_nothing(no_tensorrt, tmp_path):
    script = no_tensorrt / "trtexec"
    script.write_text("#!/bin/sh\necho 'no parser for DFT' >&2; exit 3\n")
    script.chmod(0o755)
    message = r"trtexec built no engine \(status 3\): no parser for DFT; it was trtexec --onnx="
    refused(RuntimeError, message, span(), tmp_path / "net.engine", folder=tmp_path)


def fake_tensorrt(calls: list, engine: bytes | None) -> ModuleType:
    """As much of the package as an engine is built with."""
    trt = ModuleType("tensorrt")
    profile = SimpleNamespace(set_shape=lambda *shapes: calls.append(shapes))
    config = SimpleNamespace(add_optimization_profile=lambda given: calls.append(given is profile))
    builder = SimpleNamespace(
        create_network=lambda flags: calls.append(flags) or "network",
        create_builder_config=lambda: config,
        create_optimization_profile=lambda: profile,
        build_serialized_network=lambda network, given: engine,
    )

    class Logger:
        ERROR = 1

        def __init__(self, level):
            pass

    trt.Logger, trt.Builder = Logger, lambda logger: builder
    trt.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    parser = SimpleNamespace(
        parse_from_file=lambda path: Path(path).is_file() and engine != b"unread",
        num_errors=1,
        get_error=lambda _: "DFT",
    )
    trt.OnnxParser = lambda network, logger: parser
    return trt


@pytest.mark.parametrize(("dtype", "flags"), [("float32", 0), ("float16", 2)])
def test_the_package_builds_the_engine(dtype, flags, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(calls, b"an engine"))
    report = export(span(), tmp_path / "net.engine", dtype=dtype)
    assert report.path.read_bytes() == b"an engine"
    assert report.file_size == len(b"an engine")
    assert calls == [flags, ("image", (1, 3, 64, 64), (1, 3, 256, 256), (1, 3, 1024, 1024)), True]


@pytest.mark.parametrize(
    ("engine", "message"), [(None, "TensorRT built no engine"), (b"unread", "cannot read the ONNX.*DFT")]
)
def test_a_package_that_fails_leaves_nothing(engine, message, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt([], engine))
    refused(RuntimeError, message, span(), tmp_path / "net.engine", folder=tmp_path)


def test_a_profile_keeps_what_is_fixed():
    assert profile_for((2, 3, 48, 1), {3}) == ((2, 3, 48, 1), (2, 3, 48, 1), (2, 3, 48, 4))


@pytest.mark.skipif(shutil.which("trtexec") is None, reason="TensorRT is not installed")
def test_the_real_trtexec(tmp_path):
    assert export(span(), tmp_path / "net.engine").path.stat().st_size > 1000
