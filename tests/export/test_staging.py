"""Directories written whole or not at all."""

import os

import pytest

from pdae_fast.errors import UserError
from pdae_fast.export.staging import check_target, staged_directory


def always(path):
    return True


def fill(directory, text="new"):
    (directory / "file").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_directory_appears_at_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged_directory(out) as staging:
        fill(staging)
        assert not out.exists() and staging.parent == out.parent
    assert (out / "file").read_text() == "new" and names(out.parent) == ["out"]


def test_an_earlier_export_is_replaced_whole(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale").write_text("old")
    with staged_directory(out, always) as staging:
        fill(staging)
        assert names(out) == ["stale"]
    assert names(out) == ["file"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt, OSError])
def test_after_an_error_everything_is_as_before(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(error), staged_directory(out, always) as staging:
        fill(staging)
        raise error("stop")
    assert names(out) == ["old"] and names(tmp_path) == ["out"]


def test_anything_else_at_the_place_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    check_target(out)  # an empty directory is as good as none
    (out / "holiday.jpg").write_text("precious")
    with pytest.raises(UserError, match="not empty and not an earlier export"), staged_directory(out):
        raise AssertionError("the work must not begin")
    with pytest.raises(UserError, match="holiday.jpg: a file; expected a directory"):
        check_target(out / "holiday.jpg")
    assert names(tmp_path) == ["out"] and names(out) == ["holiday.jpg"]


def test_what_appears_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="not empty"), staged_directory(out) as staging:
        fill(staging)
        out.mkdir()
        (out / "holiday.jpg").write_text("precious")
    assert names(tmp_path) == ["out"] and names(out) == ["holiday.jpg"]


def test_a_failing_rename_brings_the_old_one_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rename = os.rename

    def failing(source, target):
        if str(target) == str(out) and not str(source).endswith(".old"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(UserError, match="No space left"), staged_directory(out, always) as staging:
        fill(staging)
    assert names(out) == ["old"] and names(tmp_path) == ["out"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with staged_directory(tmp_path / "out") as staging:
        fill(staging)
    assert (tmp_path / "out").is_symlink() and names(tmp_path / "disk") == ["file"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create the folder"), staged_directory(tmp_path / "file" / "out"):
        raise AssertionError("the work must not begin")
