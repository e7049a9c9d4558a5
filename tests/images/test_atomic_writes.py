"""A file appears whole or not at all, and takes no other's place unasked."""

import os
import stat
from pathlib import Path

import pytest
import torch

from claritycore.images import Picture, read_image, write_image

SUFFIXES = (".png", ".tif", ".jpg", ".webp", ".bmp")
OLD, NEW = Picture(torch.zeros(1, 3, 4, 5)), Picture(torch.ones(1, 3, 6, 7))


@pytest.fixture(params=SUFFIXES)
def path(request, tmp_path):
    return tmp_path / f"picture{request.param}"


def assert_only(path, data):
    assert path.read_bytes() == data
    assert list(path.parent.iterdir()) == [path]


def failing(*args, **kwargs):
    raise OSError("no space left")


def test_overwriting_replaces_the_whole_file(path):
    write_image(path, OLD)
    write_image(path, NEW, overwrite=True)
    assert torch.equal(read_image(path).pixels, NEW.pixels)
    assert list(path.parent.iterdir()) == [path]


def test_without_overwrite_the_old_file_stays(path):
    write_image(path, OLD)
    data = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists: pass overwrite=True"):
        write_image(path, NEW)
    assert_only(path, data)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_litter(path, monkeypatch, step):
    write_image(path, OLD)
    data = path.read_bytes()
    monkeypatch.setattr(os, step, failing)
    with pytest.raises(OSError, match="no space left"):
        write_image(path, NEW, overwrite=True)
    assert_only(path, data)


@pytest.mark.parametrize("step", ["fsync", "link"])
def test_a_failure_leaves_nothing_where_nothing_was(path, monkeypatch, step):
    monkeypatch.setattr(os, step, failing)
    if step == "link":  # then the way without hard links fails too
        monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no space left"):
        write_image(path, NEW)
    assert not list(path.parent.iterdir())


def test_an_encoder_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    write_image(path, OLD)
    data = path.read_bytes()
    monkeypatch.setattr("PIL.Image.Image.save", failing)
    with pytest.raises(ValueError, match=r"a\.jpg cannot be written as JPEG: no space left"):
        write_image(path, NEW, overwrite=True)
    assert_only(path, data)


def test_an_interruption_leaves_no_litter(path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_image(path, NEW)
    assert not list(path.parent.iterdir())


def test_without_hard_links_the_file_is_written_all_the_same(path, monkeypatch):
    monkeypatch.setattr(os, "link", failing)
    write_image(path, NEW)
    assert torch.equal(read_image(path).pixels, NEW.pixels)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_appears_meanwhile_is_not_overwritten(path, monkeypatch, hard_links):
    fsync, link = os.fsync, os.link

    def someone_else_writes(descriptor):
        fsync(descriptor)
        path.write_bytes(b"theirs")

    monkeypatch.setattr(os, "fsync", someone_else_writes)
    monkeypatch.setattr(os, "link", link if hard_links else failing)
    with pytest.raises(FileExistsError, match="exists: pass overwrite=True to replace it"):
        write_image(path, NEW)
    assert_only(path, b"theirs")


def test_a_link_to_nowhere_counts_as_a_file(tmp_path):
    path = tmp_path / "a.png"
    path.symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(FileExistsError, match=r"a\.png exists"):
        write_image(path, NEW)
    assert path.is_symlink()


@pytest.mark.parametrize("target_exists", [True, False])
def test_overwriting_a_link_writes_the_file_that_it_points_to(tmp_path, target_exists):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "b.png", tmp_path / "a.png"
    if target_exists:
        write_image(target, OLD)
    link.symlink_to(Path("elsewhere") / "b.png")
    write_image(link, NEW, overwrite=True)
    assert link.is_symlink()
    assert not target.is_symlink()
    assert torch.equal(read_image(target).pixels, NEW.pixels)
    assert list(target.parent.iterdir()) == [target]
    assert sorted(tmp_path.iterdir()) == [link, target.parent]


def test_a_link_to_a_missing_folder_is_refused(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere" / "b.png")
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder: create it before writing b\.png"):
        write_image(tmp_path / "a.png", NEW, overwrite=True)


def test_permissions(tmp_path):
    umask = os.umask(0o027)
    try:
        write_image(tmp_path / "a.png", OLD)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o640
    Path(tmp_path / "a.png").chmod(0o600)
    write_image(tmp_path / "a.png", NEW, overwrite=True)
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o600
