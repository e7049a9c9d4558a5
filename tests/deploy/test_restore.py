"""Restoring files: what comes out, where it goes, what is said, and that nothing else is touched."""

import io
import subprocess
import sys

import pytest
import torch
from PIL import Image, ImageCms
from torch import nn

from claritycore.blocks import NoiseInjection
from claritycore.cli import main
from claritycore.deploy import (
    RestoreOptions,
    RestoreReport,
    SelfEnsemble,
    restore_files,
)
from claritycore.deploy.progress import ProgressLine, one_line
from claritycore.deploy.restore_files import find_device
from claritycore.images import imresize, read_image
from claritycore.nets import RRDBNet, convert_state
from tests.deploy.test_restore_pictures import through
from tests.small_nets import made, small_harmonic

# Files: what comes out


def test_a_file_becomes_a_file(run, make_net, make_picture, tmp_path):
    source = make_picture("a.png")
    status, out, err = run("-i", source, "-o", tmp_path / "b.png")
    assert (status, err) == (0, [])
    assert out == f"{tmp_path / 'b.png'}: 16 x 12, whole on cpu\n"
    expected = through(make_net(), read_image(source).pixels)
    torch.testing.assert_close(read_image(tmp_path / "b.png").pixels, expected, rtol=0, atol=0.501 / 255)


@pytest.mark.parametrize(("name", "depth"), [("a.png", 16), ("a.tif", 16), ("a.png", 8), ("a.tif", 8)])
@pytest.mark.parametrize(("channels", "alpha"), [(1, False), (1, True), (3, False), (3, True)])
def test_depth_grey_and_alpha_stay(run, make_picture, tmp_path, name, depth, channels, alpha):
    source = make_picture(name, channels=channels, alpha=alpha, depth=depth)
    assert run("-i", source, "-o", tmp_path / "out")[0] == 0
    restored = read_image(tmp_path / "out" / name)
    assert (restored.depth, restored.pixels.shape[1], restored.alpha is not None) == (depth, channels, alpha)
    assert tuple(restored.pixels.shape[2:]) == (12, 16)
    if depth == 16:
        assert (restored.pixels * 65535 % 257).round().any()


def test_profile_and_exif_stay(run, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Camera maker", 6
    Image.new("RGB", (5, 3), (9, 99, 199)).save(tmp_path / "a.jpg", icc_profile=profile, exif=exif.tobytes())
    assert run("-i", tmp_path / "a.jpg", "-o", tmp_path / "out")[0] == 0
    with Image.open(tmp_path / "out" / "a.jpg") as restored:
        assert restored.size == (6, 10)  # turned upright, and enlarged
        assert restored.info["icc_profile"] == profile
        assert restored.getexif()[0x010F] == "Camera maker"
        assert restored.getexif()[0x0112] == 1


def test_names_formats_depth_and_quality_in_a_folder(run, make_picture, tmp_path):
    source = make_picture("a.bmp", 40, 40)
    options = ("-i", source, "-o", tmp_path / "out")
    assert run(*options, "--suffix", "_x2", "--ext", "PNG", "--depth", "16")[0] == 0
    assert read_image(tmp_path / "out" / "a_x2.png").depth == 16
    for quality in (30, 90):
        assert run(*options, "--ext", "jpg", "--suffix", quality, "--quality", quality)[0] == 0
    low, high = ((tmp_path / "out" / f"a{quality}.jpg").stat().st_size for quality in (30, 90))
    assert low < 0.7 * high
    assert run(*options, "--quality", "30")[0] == 0  # BMP has none
    assert (tmp_path / "out" / "a.bmp").exists()


def test_tiles_give_the_file_of_the_whole_picture(run, make_picture, tmp_path):
    source = make_picture("a.png", 90, 70, depth=16)
    assert run("-i", source, "-o", tmp_path / "whole.tif")[0] == 0
    status, out, _ = run("-i", source, "-o", tmp_path / "tiles.tif", "--tile", "24", "--batch", "4")
    assert status == 0
    assert "140 x 180, in tiles of 24 with 19 pixels around each (exact) on cpu" in out
    whole, tiles = (read_image(tmp_path / name).pixels for name in ("whole.tif", "tiles.tif"))
    assert (whole - tiles).abs().max() <= 1.01 / 65535
    status, out, _ = run("-i", source, "-o", tmp_path / "blended.tif", "--tile", "24", "--overlap", "4")
    assert "in tiles of 24 with 4 pixels around each (blended)" in out
    assert 1 / 65535 < (read_image(tmp_path / "blended.tif").pixels - whole).abs().max() < 0.5


def test_noise_is_asked_for_by_a_seed_and_the_same_in_tiles(run, make_picture, tmp_path):
    net = made(small_harmonic, fast_path=True)
    for part in net.modules():
        if isinstance(part, NoiseInjection):
            nn.init.ones_(part.weight)
    model, source = net.save_pretrained(tmp_path / "net.safetensors"), make_picture("a.png", 90, 20, depth=16)
    seeded, found = ("--noise-seed", "7"), {}
    ways = {"plain": (), "whole": seeded, "tiles": (*seeded, "--tile", "32"), "other": ("--noise-seed", "8")}
    for name, options in ways.items():
        assert run("-i", source, "-o", tmp_path / f"{name}.png", *options, model=model)[0] == 0
        found[name] = read_image(tmp_path / f"{name}.png").pixels
    torch.testing.assert_close(found["tiles"], found["whole"], rtol=0, atol=2 / 65535)
    for name in ("plain", "other"):
        assert (found[name] - found["whole"]).abs().max() > 100 / 65535
    assert run("-i", source, "-o", tmp_path / "b.png", *seeded) == (
        2,
        "",
        [f"claritycore: {source}: noise_seed must be None for RRDBNet, which takes none"],
    )


def test_tiles_run_in_batches(run, make_picture, tmp_path, monkeypatch):
    forward, seen = RRDBNet.forward, []
    monkeypatch.setattr(RRDBNet, "forward", lambda net, image: seen.append(len(image)) or forward(net, image))
    assert run("-i", make_picture("a.png", 8, 200), "-o", tmp_path / "b.png", "--tile", "20", "--batch", "3")[0] == 0
    assert max(seen) == 3
    assert sum(seen) == 10


def test_tta_averages_over_turns_and_mirrorings(run, make_net, make_picture, tmp_path):
    source = make_picture("a.png")
    assert run("-i", source, "-o", tmp_path / "b.png", "--tta", "--tile", "5")[0] == 0
    expected = through(SelfEnsemble(make_net()), read_image(source).pixels)
    torch.testing.assert_close(read_image(tmp_path / "b.png").pixels, expected, rtol=0, atol=0.501 / 255)
    plain = through(make_net(), read_image(source).pixels)
    assert (plain - expected).abs().max() > 2 / 255


@pytest.mark.parametrize("alpha", [False, True])
def test_the_comparison_has_the_bicubic_picture_on_its_left(run, make_picture, tmp_path, alpha):
    source = make_picture("a.png", alpha=alpha)
    assert run("-i", source, "-o", tmp_path / "out", "--side-by-side")[0] == 0
    restored = read_image(tmp_path / "out" / "a.png")
    both = read_image(tmp_path / "out" / "a_comparison.png")
    bicubic = imresize(read_image(source).pixels, 2, intermediate="float").clamp(0, 1)
    torch.testing.assert_close(both.pixels[..., :16], bicubic, rtol=0, atol=0.501 / 255)
    assert torch.equal(both.pixels[..., 16:], restored.pixels)
    assert (both.alpha is not None) == alpha


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(run, make_net, make_picture, tmp_path, dtype):
    source = make_picture("a.png", 20, 20)
    status, _, err = run("-i", source, "-o", tmp_path / "b.png", "--dtype", dtype)
    assert (status, err) == (0, [])
    expected = through(make_net(), read_image(source).pixels)
    torch.testing.assert_close(read_image(tmp_path / "b.png").pixels, expected, rtol=0, atol=0.03)


def test_half_precision_that_overflows_is_repeated_in_float32(run, make_net, make_picture, tmp_path):
    net = make_net()
    with torch.no_grad():
        net.conv_hr.weight.mul_(1e7)
        net.conv_last.weight.div_(1e7)
    model = net.save_pretrained(tmp_path / "hot.safetensors")
    source = make_picture("a.png")
    status, _, err = run("-i", source, "-o", tmp_path / "b.png", "--dtype", "float16", model=model)
    assert (status, err) == (0, [f"{source}: float16 gives NaN or infinity, so it is restored in float32"])
    expected = through(net, read_image(source).pixels)
    torch.testing.assert_close(read_image(tmp_path / "b.png").pixels, expected, rtol=0, atol=0.501 / 255)


def test_a_warning_of_the_tiles_becomes_a_note(make_picture, tmp_path):
    notes = []
    report = restore_files(
        nn.Upsample(scale_factor=2),
        [make_picture("a.png", 20)],
        tmp_path / "b.png",
        RestoreOptions(tile=8),
        note=notes.append,
    )
    assert report == RestoreReport([tmp_path / "b.png"], {})
    (told,) = notes
    assert told.startswith(
        f"{tmp_path / 'a.png'}: Upsample sees the whole image or does not say how far it sees: its tiles differ"
    )


# Files: where they go


def below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_folders_are_mirrored(run, make_picture, tmp_path):
    for name in ("in/a.png", "in/deep/a.png", "in/deep/er/b.tif", "in/.hidden.png"):
        make_picture(name)
    (tmp_path / "in" / "notes.txt").touch()
    assert run("-i", tmp_path / "in", "-o", tmp_path / "flat")[0] == 0
    assert below(tmp_path / "flat") == ["a.png"]
    assert run("-i", tmp_path / "in", "-o", tmp_path / "all", "--recursive")[0] == 0
    assert below(tmp_path / "all") == ["a.png", "deep/a.png", "deep/er/b.tif"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("in/*.png", ["a.png", "b.png"]),
        ("in/**/*.png", ["a.png", "b.png", "deep/a.png"]),
        ("in/?.png", ["a.png", "b.png"]),
        ("in/[bc].*", ["b.png"]),
        ("*/deep/*", ["in/deep/a.png", "in/deep/b.tif"]),
    ],
)
def test_patterns(run, make_picture, tmp_path, monkeypatch, pattern, found):
    for name in ("in/a.png", "in/b.png", "in/deep/a.png", "in/deep/b.tif"):
        make_picture(name)
    monkeypatch.chdir(tmp_path)
    assert run("-i", pattern, "-o", "out")[0] == 0
    assert below(tmp_path / "out") == found


def test_a_name_that_looks_like_a_pattern_is_a_file(run, make_picture, tmp_path):
    assert run("-i", make_picture("a[1].png"), "-o", tmp_path / "b.png")[0] == 0


def test_many_inputs_and_one_given_twice(run, make_picture, tmp_path):
    one, two = make_picture("in/a.png"), make_picture("b.png")
    status, out, _ = run("-i", one, two, tmp_path / "in", one, "-o", tmp_path / "out")
    assert (status, out.count("\n")) == (0, 2)
    assert below(tmp_path / "out") == ["a.png", "b.png"]
    assert run("-i", one, "-i", two, "-o", tmp_path / "again")[0] == 0
    assert below(tmp_path / "again") == ["a.png", "b.png"]


def test_results_of_an_earlier_run_are_no_inputs(run, make_picture, tmp_path):
    make_picture("in/a.png")
    for number, options in enumerate([(), ("--suffix", "2")], start=1):
        assert run("-i", tmp_path / "in", "-o", tmp_path / "in" / "out", "--recursive", *options)[0] == 0
        assert len(below(tmp_path / "in" / "out")) == number


def test_an_output_without_extension_is_a_folder(run, make_picture, tmp_path):
    assert run("-i", make_picture("a.png"), "-o", tmp_path / "new" / "folder")[0] == 0
    assert below(tmp_path / "new") == ["folder/a.png"]


def test_a_run_goes_on_where_results_exist(run, refused, make_picture, tmp_path):
    for name in ("a.png", "below/b.png"):
        make_picture(f"in/{name}")
    flags = ("-i", tmp_path / "in", "-o", tmp_path / "out", "--recursive")
    assert run(*flags)[0] == 0
    (tmp_path / "out" / "a.png").write_bytes(b"as it was")
    make_picture("in/c.png")
    assert "--skip-existing to leave it" in refused(*flags)
    status, out, err = run(*flags, "--skip-existing")
    assert (status, err) == (0, ["2 of 3 left out: their results exist"])
    assert [line.partition(":")[0] for line in out.splitlines()] == [str(tmp_path / "out" / "c.png")]
    assert (tmp_path / "out" / "a.png").read_bytes() == b"as it was"
    assert run(*flags, "--skip-existing") == (0, "", ["3 of 3 left out: their results exist"])
    make_picture("in/d.png")
    (tmp_path / "out" / "d_comparison.png").write_bytes(b"")  # without a result: somebody else's
    told = "d_comparison.png exists: give --overwrite to replace it, or another --output"
    assert refused(*flags, "--skip-existing", "--side-by-side").endswith(told)
    assert "contradict each other" in refused(*flags, "--skip-existing", "--overwrite")


def test_in_place_with_overwrite(run, make_picture, tmp_path):
    source = make_picture("in/a.png")
    before = source.read_bytes()
    status, _, err = run("-i", tmp_path / "in", "-o", tmp_path / "in")
    assert (status, len(err)) == (2, 1)
    assert "a.png exists: give --overwrite to replace it, --skip-existing to leave it, or another --output" in err[0]
    assert source.read_bytes() == before
    assert run("-i", tmp_path / "in", "-o", tmp_path / "in", "--overwrite")[0] == 0
    assert tuple(read_image(source).pixels.shape[2:]) == (12, 16)
    assert below(tmp_path / "in") == ["a.png"]


# What is said


def test_a_run_goes_on_after_a_picture_that_fails(run, make_picture, tmp_path):
    for name in ("in/a.png", "in/c.png"):
        make_picture(name)
    (tmp_path / "in" / "b.png").write_bytes(b"")
    status, out, err = run("-i", tmp_path / "in", "-o", tmp_path / "out")
    assert status == 2
    assert [line.split(":")[0] for line in out.splitlines()] == [
        str(tmp_path / "out" / name) for name in ("a.png", "c.png")
    ]
    assert err == [
        f"{tmp_path / 'in' / 'b.png'} is empty: fetch or export it again",
        "claritycore: 1 picture(s) not restored, 2 file(s) written",
    ]
    assert below(tmp_path / "out") == ["a.png", "c.png"]


def test_the_report_of_a_run(make_net, make_picture, tmp_path):
    good, bad = make_picture("in/a.png"), tmp_path / "in" / "b.png"
    bad.write_bytes(b"nothing")
    seen = []
    report = restore_files(make_net(), [tmp_path / "in"], tmp_path / "out", progress=seen.append)
    assert report.written == [tmp_path / "out" / "a.png"]
    assert list(report.failed) == [bad]
    assert report.failed[bad].startswith(f"{bad} is no image")
    assert seen == [f"{good} (1 of 2) 0%", f"{good} (1 of 2) 100%", f"{bad} (2 of 2) 0%"]
    with pytest.raises(ValueError, match="is no image"):
        restore_files(make_net(), [bad], tmp_path / "other")


def test_the_scale_that_was_asked_for(run, make_picture, tmp_path):
    source = make_picture("a.png")
    assert run("-i", source, "-o", tmp_path / "b.png", "--scale", "2")[0] == 0
    status, _, err = run("-i", source, "-o", tmp_path / "c.png", "--scale", "4")
    assert (status, err) == (2, ["claritycore: scale must be 2, by which the net enlarges, got 4"])
    assert below(tmp_path) == ["a.png", "b.png"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_line_is_rewritten_on_a_terminal_and_silent_elsewhere(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    for stream, written in ((Terminal(), "\r\033[Kshort\r\033[K...d of a long line\r\033[K"), (io.StringIO(), "")):
        line = ProgressLine(stream)
        line.show("short")
        line.show("the end of a long line")
        line.clear()
        assert stream.getvalue() == written


def test_the_progress_line_is_gone_before_anything_else_is_said(checkpoint, make_picture, tmp_path, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    source = make_picture("a.png")
    assert main(["restore", "-i", str(source), "-o", str(tmp_path / "b.png"), "-m", str(checkpoint)]) == 0
    told = stream.getvalue()
    assert f"\r\033[K{source} 100%"[-15:] in told
    assert told.split("\r\033[K")[-2].startswith(str(tmp_path / "b.png"))


def test_names_do_nothing_to_a_terminal():
    assert one_line("a\x1b[31m\nb\udcff") == "a [31m b"


def test_devices():
    assert find_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("cuda:99", "meta", "nonsense"):
        with pytest.raises(ValueError, match=rf"^device '{name}' cannot be used here: "):
            find_device(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0}, "^scale must be an integer of at least 1, got 0$"),
        ({"tile": 0}, "^tile must be an integer of at least 1, got 0$"),
        ({"batch": 0}, "^batch must be an integer of at least 1, got 0$"),
        ({"max_pixels": 0}, "^max_pixels must be an integer of at least 1, got 0$"),
        ({"overlap": -1}, "^overlap must be an integer of at least 0, got -1$"),
        ({"dtype": "float8"}, "^dtype must be one of float32, float16, bfloat16, got 'float8'$"),
        ({"alpha": "cubic"}, "^alpha must be one of bicubic, model, drop, got 'cubic'$"),
        ({"suffix": "a/b"}, "^suffix must be a part of a name"),
        ({"depth": 12}, "^depth must be 8 or 16, got 12$"),
        ({"quality": 0}, "^quality must be from 1 to 100, got 0$"),
        ({"ext": "gif"}, "^ext must be one of png, tif, tiff, jpg, jpeg, webp, bmp, got 'gif'$"),
        ({"noise_seed": -1}, r"^noise_seed must be from 0 to 2\^63 - 1, got -1$"),
        ({"noise_seed": 0, "tta": True}, "^noise_seed is for single tiles: leave out tta, whose mean blurs noise, and"),
        ({"noise_seed": 0, "batch": 2}, "^noise_seed is for single tiles: leave out tta, whose mean blurs noise, and"),
        ({"ext": "png", "quality": 90}, "^quality is of JPEG and WebP; leave it out for PNG$"),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        RestoreOptions(**options)


def test_it_runs_as_a_command(checkpoint, make_picture, tmp_path):
    source = make_picture("a.png")
    command = [sys.executable, "-m", "claritycore", "restore", "-i", str(source), "-o", str(tmp_path / "b.png")]
    done = subprocess.run([*command, "--model", str(checkpoint)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    again = subprocess.run([*command, "--model", str(checkpoint)], capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stdout == ""
    assert (
        again.stderr == f"claritycore: {tmp_path / 'b.png'} exists: give --overwrite to replace it, "
        "--skip-existing to leave it, or another --output\n"
    )


def test_scale_decides_where_a_file_leaves_it_open(make_net, make_picture, tmp_path, capsys):
    net = make_net(scale=3, upsampler="nearest+conv")
    torch.save(convert_state(net, "rrdbnet-esrgan-old"), tmp_path / "theirs.pth")
    source = make_picture("small.png", 5, 7)
    common = ["restore", "-i", str(source), "--model", str(tmp_path / "theirs.pth"), "-o"]
    assert main([*common, str(tmp_path / "assumed.png")]) == 0
    assert capsys.readouterr().err == (
        f"{tmp_path / 'theirs.pth'} leaves open the scale, 2 or 3, of the one stage: 2 is assumed\n"
    )
    assert main([*common, str(tmp_path / "told.png"), "--scale", "3"]) == 0
    assert capsys.readouterr().err == ""
    sizes = [tuple(read_image(tmp_path / name).pixels.shape[2:]) for name in ("assumed.png", "told.png")]
    assert sizes == [(10, 14), (15, 21)]
