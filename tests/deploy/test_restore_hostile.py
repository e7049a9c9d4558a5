"""Whatever is wrong with a file, a disk or a machine: one clear line, status 2, and nothing lost or overwritten."""

import errno
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from safetensors.torch import save_file

from claritycore.cli import main
from claritycore.deploy import RestoreOptions, restore_files
from claritycore.images import read_image, writing
from claritycore.nets import RRDBNet

# Pictures


def png_of_size(width, height):
    """A header that promises more than any machine holds, and nothing behind it."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def cut_short(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    return (tmp_path / "whole.png").read_bytes()[:500]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda _: b"", "is empty: fetch or export it again"),
        (lambda _: b"\0" * 5000, "is no image that can be read here"),
        (cut_short, "is damaged or cut short"),
        (lambda _: png_of_size(60_000, 60_000), "has 60000 x 60000 pixels and is above the limit"),
        (lambda _: b"\x89PNG\r\n\x1a\n", "is damaged or cut short"),
        (lambda _: b"GIF89a" + bytes(50), "is no image that can be read here"),
    ],
)
def test_files_that_are_no_pictures(refused, tmp_path, content, told):
    source = tmp_path / "a.png"
    source.write_bytes(content(tmp_path))
    line = refused("-i", source, "-o", tmp_path / "b.png")
    assert told in line
    assert line.count(str(source)) == 1


def test_floating_point_and_cielab_are_refused(refused, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 4, 3), np.float32), photometric="rgb")
    assert "stores 3 samples of 32 bits" in refused("-i", tmp_path / "a.tif", "-o", tmp_path / "b.tif")


@pytest.mark.parametrize("size", [(1, 1), (20_000, 8), (1, 500)])
def test_tiny_and_oblong_pictures_are_restored(run, make_picture, tmp_path, size):
    width, height = size
    source = make_picture("a.png", height, width)
    status, _, err = run("-i", source, "-o", tmp_path / "b.png", "--side-by-side", "--tile", "4000")
    assert (status, err) == (0, [])
    assert tuple(read_image(tmp_path / "b.png").pixels.shape[2:]) == (2 * height, 2 * width)


def test_a_result_that_its_format_cannot_hold_is_refused_before_the_work(refused, make_picture, tmp_path, monkeypatch):
    monkeypatch.setattr(RRDBNet, "forward", None)
    wide = make_picture("wide.png", 1, 40_000)
    assert refused("-i", wide, "-o", tmp_path / "b.jpg") == (
        f"{wide}: JPEG holds sides of up to 65500 pixels, not 80000: give --ext png"
    )
    clear = make_picture("clear.png", alpha=True)
    for suffix, name in ((".jpg", "JPEG"), (".bmp", "BMP")):
        assert refused("-i", clear, "-o", tmp_path / f"b{suffix}") == (
            f"{clear}: {name} cannot hold its transparency: give --ext png, or --alpha drop"
        )
    deep = make_picture("deep.png", depth=16)
    assert refused("-i", deep, "-o", tmp_path / "b.webp") == (
        f"{deep}: WebP cannot hold its 16 bits: give --ext png, or --depth 8"
    )


def test_the_ways_out_that_are_named_work(run, make_picture, tmp_path):
    clear, deep = make_picture("clear.png", alpha=True), make_picture("deep.png", depth=16)
    assert run("-i", clear, "-o", tmp_path / "out", "--ext", "jpg", "--alpha", "drop")[0] == 0
    assert run("-i", deep, "-o", tmp_path / "out", "--ext", "webp", "--depth", "8")[0] == 0


def test_cmyk_and_palettes_with_transparency(run, tmp_path):
    Image.new("CMYK", (5, 4), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    palette = Image.new("P", (5, 4))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 1), 1)
    palette.save(tmp_path / "p.png", transparency=1)
    status, _, err = run("-i", tmp_path / "a.jpg", tmp_path / "p.png", "-o", tmp_path / "out")
    assert (status, err) == (0, [])
    assert read_image(tmp_path / "out" / "a.jpg").pixels.shape[1] == 3
    alpha = read_image(tmp_path / "out" / "p.png").alpha
    assert alpha.min() < 0.3 < 0.9 < alpha.max()


def test_a_picture_above_the_limit_is_taken_when_trusted(run, refused, make_picture, tmp_path):
    source = make_picture("a.png", 10, 10)
    assert "above the limit of 99 pixels" in refused("-i", source, "-o", tmp_path / "b.png", "--max-pixels", "99")
    assert run("-i", source, "-o", tmp_path / "b.png", "--max-pixels", "100")[0] == 0


# Models


class Payload:
    def __reduce__(self):
        return os.mkdir, ("run-by-a-pickle",)


def test_a_hostile_pickle_is_not_run(refused, make_picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = make_picture("a.png")
    torch.save({"weight": Payload()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload()))
    for name in ("evil.pth", "plain.pth"):
        line = refused("-i", source, "-o", tmp_path / "b.png", model=tmp_path / name)
        assert name in line
        assert "refused" in line or "damaged" in line
    assert not (tmp_path / "run-by-a-pickle").exists()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda data: b"", "no safetensors file"),
        (lambda data: data[: len(data) // 2], "no safetensors file"),
        (lambda data: b"\xff" * 8 + data[8:], "no safetensors file"),
        (lambda data: data.replace(b'num_feat\\":', b'num_feet\\":'), "describes a net that cannot be made"),
        (lambda data: data.replace(b'\\"rrdbnet\\"', b'\\"nothing\\"'), "describes a net that cannot be made"),
        (lambda data: data.replace(b'num_feat\\": 4', b'num_feat\\": 5'), "does not fit RRDBNet"),
    ],
)
def test_damaged_checkpoints(refused, checkpoint, make_picture, tmp_path, damage, told):
    model = tmp_path / "model.safetensors"
    damaged = damage(checkpoint.read_bytes())
    assert damaged != checkpoint.read_bytes()
    model.write_bytes(damaged)
    assert told in refused("-i", make_picture("a.png"), "-o", tmp_path / "b.png", model=model)


def test_models_that_are_none(refused, make_picture, tmp_path):
    source = make_picture("a.png")
    assert "there is no checkpoint" in refused(
        "-i", source, "-o", tmp_path / "b.png", model=tmp_path / "none.safetensors"
    )
    assert "must end in" in refused("-i", source, "-o", tmp_path / "b.png", model=source)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    refused("-i", source, "-o", tmp_path / "b.png", model=tmp_path / "other.safetensors")


def test_a_net_for_other_data_is_refused(refused, make_net, make_picture, tmp_path):
    model = make_net(channels=12).save_pretrained(tmp_path / "x.safetensors")
    told = "RRDBNet takes images of 12 channels, and pictures have 1 or 3"
    assert refused("-i", make_picture("a.png"), "-o", tmp_path / "b.png", model=model) == told


def test_weights_that_are_not_finite_write_nothing(refused, make_net, make_picture, tmp_path):
    net = make_net()
    with torch.no_grad():
        net.conv_first.bias.fill_(float("nan"))
    model = net.save_pretrained(tmp_path / "nan.safetensors")
    source = make_picture("a.png")
    told = f"{source}: RRDBNet makes NaN or infinity of it in this dtype"
    assert refused("-i", source, "-o", tmp_path / "b.png", model=model) == told


# Places


def test_inputs_that_are_none(refused, make_picture, tmp_path):
    assert refused("-i", tmp_path / "a.png", "-o", "b.png") == f"{tmp_path / 'a.png'} does not exist: check the path"
    (tmp_path / "in" / "deep").mkdir(parents=True)
    make_picture("in/deep/a.png")
    line = refused("-i", tmp_path / "in", "-o", tmp_path / "out")
    assert line == f"{tmp_path / 'in'}: no PNG, TIFF, JPEG, WebP or BMP file there; --recursive looks into its folders"
    assert "no PNG" in refused("-i", tmp_path / "*.png", "-o", tmp_path / "out")
    for none in ([], ["-i"]):
        assert refused("-o", tmp_path / "out", *none) == "there must be at least one input"
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    assert "does not exist" in refused("-i", tmp_path / "gone.png", "-o", tmp_path / "b.png")


def test_two_pictures_with_one_result(refused, make_picture, tmp_path):
    one, two = make_picture("one/a.png"), make_picture("two/a.png")
    line = refused("-i", one, two, "-o", tmp_path / "out", "--overwrite")
    assert line.startswith(f"{one} and {two} would both become {tmp_path / 'out' / 'a.png'}")
    make_picture("one/a.tif")
    assert "would both become" in refused("-i", tmp_path / "one", "-o", tmp_path / "out", "--ext", "png")
    make_picture("one/a_comparison.png")
    assert "would both become" in refused("-i", tmp_path / "one", "-o", tmp_path / "out", "--side-by-side")


def test_a_result_that_is_there(refused, make_picture, tmp_path):
    for name in ("in/a.png", "in/b.png", "in/c.png", "out/b.png", "out/c.png"):
        make_picture(name)
    line = refused("-i", tmp_path / "in", "-o", tmp_path / "out")
    assert (
        line == f"{tmp_path / 'out' / 'b.png'} exists (and 1 more): give --overwrite to replace it, "
        "--skip-existing to leave it, or another --output"
    )
    assert "exists" in refused("-i", tmp_path / "in" / "a.png", "-o", tmp_path / "in" / "a.png")


def test_a_result_in_the_place_of_another_input(refused, make_picture, tmp_path):
    make_picture("a.png", seed=1)
    make_picture("a_x.png", seed=2)
    line = refused("-i", tmp_path, "-o", tmp_path, "--suffix", "_x", "--overwrite")
    assert line.startswith(f"the result of {tmp_path / 'a.png'} would replace {tmp_path / 'a_x.png'}, an input")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").symlink_to(tmp_path / "a_x.png")
    line = refused("-i", tmp_path / "a.png", tmp_path / "a_x.png", "-o", tmp_path / "out", "--overwrite")
    assert "would replace" in line
    make_picture("b.png")
    make_picture("b_comparison.png")
    line = refused("-i", tmp_path / "b*.png", "-o", tmp_path, "--overwrite", "--side-by-side")
    assert "would" in line


def test_outputs_that_cannot_hold_the_results(refused, make_picture, tmp_path):
    source = make_picture("a.png")
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    assert refused("-i", source, "-o", tmp_path / "file") == f"{tmp_path / 'file'} is a file: it cannot hold a.png"
    assert "is a file: it cannot hold b.png" in refused("-i", source, "-o", tmp_path / "file" / "x" / "b.png")
    assert "must end in one of .png" in refused("-i", source, "-o", tmp_path / "b.gif")
    assert "leave them out" in refused("-i", source, "-o", tmp_path / "b.png", "--ext", "png")
    make_picture("in/c.png")
    (tmp_path / "out" / "c.png").mkdir(parents=True)
    assert "is a folder: give another name" in refused("-i", tmp_path / "in", "-o", tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(refused, make_picture, tmp_path):
    source, locked = make_picture("a.png"), tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "may not be written to" in refused("-i", source, "-o", locked)


def test_a_folder_that_may_not_be_written_to_by_what_the_system_says(refused, make_picture, tmp_path, monkeypatch):
    source = make_picture("a.png")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert refused("-i", source, "-o", tmp_path / "out") == f"{tmp_path} may not be written to: give another --output"


# The machine


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_written(refused, make_picture, tmp_path, monkeypatch, code):
    def fails(descriptor):
        raise OSError(code, os.strerror(code))

    source, target = make_picture("a.png"), make_picture("b.png", seed=5)
    monkeypatch.setattr(writing.os, "fsync", fails)
    line = refused("-i", source, "-o", target, "--overwrite")
    assert line == f"{target} cannot be written: {os.strerror(code)}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_is_really_full(refused, make_picture, tmp_path, monkeypatch):
    opened = type(tmp_path).open

    def full(self, mode="r", *rest):
        return opened(Path("/dev/full"), "wb") if mode == "xb" else opened(self, mode, *rest)

    source = make_picture("a.png")
    monkeypatch.setattr(type(tmp_path), "open", full)
    assert "b.png cannot be written: No space left on device" in refused("-i", source, "-o", tmp_path / "b.png")


def test_a_full_disk_ends_the_run(run, make_picture, tmp_path, monkeypatch):
    for name in "abcd":
        make_picture(f"in/{name}.png")
    synchronised = []

    def fills(descriptor):
        synchronised.append(descriptor)
        if len(synchronised) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", fills)
    status, out, err = run("-i", tmp_path / "in", "-o", tmp_path / "out")
    assert (status, out.count("\n")) == (2, 1)
    assert err == [
        f"{tmp_path / 'out' / 'b.png'} cannot be written: No space left on device",
        "claritycore: 3 picture(s) not restored, 1 file(s) written",
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


def test_a_result_whose_comparison_cannot_be_written_is_counted(make_net, make_picture, tmp_path, monkeypatch):
    for name in ("in/a.png", "in/b.png"):
        make_picture(name)
    calls = []

    def fails(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(writing.os, "fsync", fails)
    report = restore_files(make_net(), [tmp_path / "in"], tmp_path / "out", RestoreOptions(side_by_side=True))
    assert report.written == [tmp_path / "out" / name for name in ("a.png", "b.png", "b_comparison.png")]
    assert list(report.failed) == [tmp_path / "in" / "a.png"]
    assert sorted((tmp_path / "out").iterdir()) == report.written


def test_a_picture_that_may_not_be_read(run, make_picture, tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    source = make_picture("a.png")
    monkeypatch.setattr(type(source), "read_bytes", denied)
    status, out, err = run("-i", source, "-o", tmp_path / "b.png")
    assert (status, out) == (2, "")
    assert err == [f"claritycore: {source} cannot be read: Permission denied"]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GiB"), MemoryError(), RuntimeError("can't allocate memory")],
    ids=str,
)
def test_too_little_memory_is_told_and_the_tiles_shrink_before(run, make_picture, tmp_path, monkeypatch, error):
    def fails(self, image):
        raise error

    monkeypatch.setattr(RRDBNet, "forward", fails)
    source = make_picture("a.png", 64, 64)
    status, out, err = run("-i", source, "-o", tmp_path / "b.png")
    assert (status, out) == (2, "")
    assert err[-1].startswith(f"claritycore: {source}: out of memory even with tiles of 16 x 16 pixels and ")
    assert not (tmp_path / "b.png").exists()


def test_memory_that_runs_out_once_is_told_and_costs_nothing(run, make_net, make_picture, tmp_path, monkeypatch):
    forward = RRDBNet.forward

    def tight(self, image):
        if image.shape[2] > 50:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, image)

    source = make_picture("a.png", 60, 8, depth=16)
    assert run("-i", source, "-o", tmp_path / "whole.png")[0] == 0
    monkeypatch.setattr(RRDBNet, "forward", tight)
    status, _, err = run("-i", source, "-o", tmp_path / "b.png")
    assert status == 0
    assert err == [f"{source}: out of memory: continuing with tiles of 8 x 30 pixels"]
    difference = read_image(tmp_path / "b.png").pixels - read_image(tmp_path / "whole.png").pixels
    assert difference.abs().max() <= 1.01 / 65535


def test_an_interrupted_run_leaves_what_is_whole(make_picture, checkpoint, tmp_path, monkeypatch, capsys):
    for name in ("in/a.png", "in/b.png"):
        make_picture(name)
    calls = []

    def interrupts(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(writing.os, "fsync", interrupts)
    arguments = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", str(checkpoint)]
    assert main(["restore", *arguments]) == 130
    assert capsys.readouterr().err == "claritycore: interrupted; what is written is whole\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_in_a_real_process(make_picture, checkpoint, tmp_path):
    small, large = make_picture("a.png"), make_picture("b.png", 1500, 1500)
    command = [
        sys.executable,
        "-m",
        "claritycore",
        "restore",
        "-i",
        small,
        large,
        "-o",
        tmp_path / "out",
        "-m",
        checkpoint,
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*map(str, command), "--tile", "64", "--tta"], **pipes) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / "a.png").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.startswith(str(tmp_path / "out" / "a.png"))
    assert err == "claritycore: interrupted; what is written is whole\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--tile", "0"], "tile must be an integer of at least 1, got 0"),
        (["--tile", "x"], "Error parsing --tile"),
        (["--overlap", "-1"], "overlap must be an integer of at least 0"),
        (["--dtype", "float8"], "float8"),
        (["--ext", "gif"], "ext must be one of png"),
        (["--quality", "101"], "quality must be from 1 to 100"),
        (["--alpha", "keep"], "keep"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
        (["--sufix", "x"], "--suffix"),
    ],
)
def test_bad_flags(refused, make_picture, tmp_path, flags, told):
    assert told in refused("-i", make_picture("a.png"), "-o", tmp_path / "b.png", *flags)


def test_a_name_full_of_escapes_is_told_in_one_line(refused, tmp_path):
    source = tmp_path / "a\n\x1b[31mb.png"
    source.write_bytes(b"")
    assert re.search(r"a  \[31mb\.png is empty", refused("-i", source, "-o", tmp_path / "b.png"))


def test_nothing_is_computed_where_a_place_is_refused(make_net, make_picture, tmp_path):
    net = make_net()
    net.forward = None
    for name in ("in/a.png", "in/b.png", "out/b.png"):
        make_picture(name)
    with pytest.raises(FileExistsError, match=r"b\.png exists: give --overwrite"):
        restore_files(net, [tmp_path / "in"], tmp_path / "out")
    assert not (tmp_path / "out" / "a.png").exists()
