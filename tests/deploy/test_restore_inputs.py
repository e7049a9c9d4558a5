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


def test_a_quality_that_a_format_has_not_is_told(run, make_picture, tmp_path):
    status, _, err = run("-i", make_picture("a.png"), "-o", tmp_path / "b.png", "--quality", "50")
    assert (status, err) == (0, [f"{tmp_path / 'b.png'}: --quality is of JPEG and WebP; PNG keeps every value"])


@pytest.mark.parametrize("flags", [("-i", "", "-o", "out"), ("-i", "a.png", "-o", "")], ids=["input", "output"])
def test_an_empty_path_is_not_the_current_folder(refused, flags, make_picture, monkeypatch, tmp_path):
    make_picture("a.png")
    monkeypatch.chdir(tmp_path)
    assert "put must be a path, got ''; the current folder is '.'" in refused(*flags)
