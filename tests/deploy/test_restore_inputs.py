"""What is no picture, or cannot be looked into, is told in one line, and the others go on."""

import errno
import os

import pytest


def test_pipes_and_devices_are_no_pictures_and_the_others_go_on(run, refused, make_picture, tmp_path):
    make_picture("in/a.png")
    make_picture("in/c.png")
    os.mkfifo(tmp_path / "in" / "b.png")
    (tmp_path / "in" / "zero.png").symlink_to("/dev/zero")
    assert "b.png is no regular file" in refused("-i", tmp_path / "in" / "b.png", "-o", tmp_path / "o.png")
    status, out, err = run("-i", tmp_path / "in", "-o", tmp_path / "out")
    assert (status, len(out.splitlines())) == (2, 2)
    assert [line.endswith("is no regular file: give the path of an image file") for line in err] == [True, True, False]


def test_a_folder_that_cannot_be_looked_into_is_told(refused, make_picture, monkeypatch, tmp_path):
    make_picture("in/a.png")
    make_picture("in/locked/b.png")
    scan = os.scandir

    def locked(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    message = refused("-i", tmp_path / "in", "-o", tmp_path / "out", "--recursive")
    assert message == f"{tmp_path / 'in' / 'locked'} cannot be read: Permission denied"


@pytest.mark.parametrize("pattern", ["in", "in/*"])
def test_a_picture_of_a_format_that_is_not_read_is_told(run, make_picture, tmp_path, pattern):
    make_picture("in/a.png")
    for name in ("moving.GIF", "telephone.heic", "notes.txt", ".hidden.gif"):
        (tmp_path / "in" / name).write_bytes(b"")
    status, out, err = run("-i", tmp_path / pattern, "-o", tmp_path / "out")
    assert (status, len(out.splitlines())) == (0, 1)
    told = "moving.GIF and 1 more left out: only PNG, TIFF, JPEG, WebP or BMP is read"
    assert err == [f"{tmp_path / pattern}: {told}"]
    (tmp_path / "in" / "moving.GIF").unlink()
    assert run("-i", tmp_path / pattern, "-o", tmp_path / "out", "--overwrite")[2] == [
        f"{tmp_path / pattern}: telephone.heic left out: only PNG, TIFF, JPEG, WebP or BMP is read"
    ]
    by_name = run("-i", tmp_path / "in" / "telephone.heic", tmp_path / "in" / "a.png", "-o", tmp_path / "named")
    assert (by_name[0], len(by_name[1].splitlines()), len(by_name[2])) == (2, 1, 2)  # it fails, and is counted


@pytest.mark.parametrize("output", [".", "..", "in/out"])
def test_results_may_go_above_or_below_the_pictures(run, make_picture, monkeypatch, tmp_path, output):
    make_picture("in/a.png")
    monkeypatch.chdir(tmp_path / "in" if output == ".." else tmp_path)
    pictures = "." if output == ".." else "in"
    assert run("-i", pictures, "-o", output, "--suffix", "_x2")[0] == 0
    assert (tmp_path / ("in/out" if output == "in/out" else "") / "a_x2.png").exists()


def test_a_quality_that_a_format_has_not_is_told(run, make_picture, tmp_path):
    status, _, err = run("-i", make_picture("a.png"), "-o", tmp_path / "b.png", "--quality", "50")
    assert (status, err) == (0, [f"{tmp_path / 'b.png'}: --quality is of JPEG and WebP; PNG keeps every value"])


@pytest.mark.parametrize("flags", [("-i", "", "-o", "out"), ("-i", "a.png", "-o", "")], ids=["input", "output"])
def test_an_empty_path_is_not_the_current_folder(refused, flags, make_picture, monkeypatch, tmp_path):
    make_picture("a.png")
    monkeypatch.chdir(tmp_path)
    assert "put must be a path, got ''; the current folder is '.'" in refused(*flags)
