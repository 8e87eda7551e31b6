import os
import stat
import subprocess
import sys

import pytest

from pdae_fast.errors import UserError
from pdae_fast.files import (
    atomic_write,
    make_folder,
)


def test_writes_bytes_and_text(tmp_path):
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"\x00\xff")
    with atomic_write(str(tmp_path / "a.txt"), "w") as file:
        file.write("ᾱ\n")
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "a.txt").read_bytes() == "ᾱ\n".encode()
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.txt"]


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_write("a") as file:
        file.write(b"x")
    assert os.listdir(tmp_path) == ["a"]


def test_nothing_is_seen_before_the_end(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with atomic_write(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
        assert os.path.dirname(file.name) == str(tmp_path)  # so that the rename stays on one file system
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit, MemoryError])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_writers_that_want_a_path(tmp_path):
    with atomic_write(tmp_path / "a") as file, open(file.name, "wb") as other:
        other.write(b"by path")
    assert (tmp_path / "a").read_bytes() == b"by path"


def test_everything_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((os.fstat(fd).st_size, os.listdir(tmp_path))))
    with atomic_write(tmp_path / "a") as file:
        file.write(b"123")
    assert synced[0][0] == 3 and "a" not in synced[0][1]


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a"):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o640


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a").write_text("old")
    (tmp_path / "link").symlink_to("real/a")
    with atomic_write(tmp_path / "link", "w") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/a").read_text() == "new"
    assert os.listdir(tmp_path / "real") == ["a"]


@pytest.mark.parametrize("name", ["long" * 60, "ж" * 120])
def test_long_names(tmp_path, name):
    with atomic_write(tmp_path / name) as file:
        file.write(b"x")
    assert os.listdir(tmp_path) == [name]


def test_folders_and_devices_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in [(tmp_path, "it is a folder"), (tmp_path / "pipe", "not a plain file")]:
        with pytest.raises(UserError, match=f"cannot write {path}: .*{kind}"), atomic_write(path):
            pass
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_no_such_folder(tmp_path):
    path = tmp_path / "none/a"
    with (
        pytest.raises(UserError, match=f"cannot write {path}: No such file or directory"),
        atomic_write(path),
    ):
        pass


def test_disk_full(tmp_path):
    """A real refusal by the system: a limit on file size, in a process of its own."""
    program = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from pdae_fast.files import atomic_write
with atomic_write({str(tmp_path / "a")!r}) as file:
    file.write(bytes(5000))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"UserError: cannot write {tmp_path / 'a'}: File too large" in done.stderr
    assert os.listdir(tmp_path) == []


def test_read_only_folder(tmp_path):
    """As an ordinary user, because root may write anywhere."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(UserError, match="Permission denied"), atomic_write(folder / "a"):
        pass


def test_an_error_about_another_file_is_passed_on(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), atomic_write(tmp_path / "a"):
        (tmp_path / "other").read_bytes()
    assert os.listdir(tmp_path) == []


def test_other_modes_are_refused(tmp_path):
    for mode in ("ab", "r+b", "r", "wt"):
        with pytest.raises(ValueError, match="mode must be"), atomic_write(tmp_path / "a", mode):
            pass
    assert os.listdir(tmp_path) == []


def test_make_folder(tmp_path):
    make_folder(tmp_path / "a/b")
    make_folder(tmp_path / "a/b")
    assert (tmp_path / "a/b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file has this name"):
        make_folder(tmp_path / "file")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match=f"cannot create the folder {path}"):
            make_folder(path)
