"""Files that are whole or not there at all, and what is told of them in advance."""

import os
import stat
import sys
from pathlib import Path

import pytest

from lib_demofusion import files
from lib_demofusion.files import check_file, check_writable, free_space, suffixed, whole_file, write_somewhere


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(path, data):
    with whole_file(path) as file:
        file.write(data)


def test_a_file_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.png"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_that_fails_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail():
        with whole_file(path) as file:
            file.write(b"half")
            raise error

    pytest.raises(error, fail)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.png"]


def test_two_that_write_one_file_at_a_time_do_not_mix(tmp_path):
    path = tmp_path / "a.png"
    with whole_file(path) as first:
        first.write(b"first")
        with whole_file(path) as second:
            second.write(b"second, longer")
        assert path.read_bytes() == b"second, longer"
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["a.png"]


@pytest.mark.parametrize("name", ["a" * 251 + ".png", "日" * 83 + ".png"])
def test_any_name_that_a_file_can_have_can_be_written(tmp_path, name):
    check_writable(tmp_path / name)
    write(tmp_path / name, b"x")
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_files_mode_is_that_of_any_other_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        write(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "real.png").write_bytes(b"old")
    (tmp_path / "second.png").symlink_to(Path("other") / "real.png")
    (tmp_path / "first.png").symlink_to("second.png")
    (tmp_path / "new.png").symlink_to(Path("other") / "new.png")
    for link, target in (("first.png", "real.png"), ("new.png", "new.png")):
        check_writable(tmp_path / link)
        write(tmp_path / link, link.encode())
        assert (tmp_path / link).is_symlink()
        assert not (tmp_path / "other" / target).is_symlink()
        assert (tmp_path / "other" / target).read_bytes() == link.encode()
    assert names(tmp_path) == ["first.png", "new.png", "other", "second.png"]
    assert names(tmp_path / "other") == ["new.png", "real.png"]


def test_what_is_no_plain_file_is_neither_replaced_nor_written(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "to_folder.png").symlink_to("folder.png")
    (tmp_path / "to_null.png").symlink_to("/dev/null")
    (tmp_path / "circle.png").symlink_to("circle.png")
    (tmp_path / "nowhere.png").symlink_to(Path("missing") / "x.png")
    os.mkfifo(tmp_path / "pipe.png")
    before = names(tmp_path)
    for name, says in [
        ("folder.png", "cannot be written: it is a folder"),
        ("to_folder.png", "cannot be written: it is a folder"),
        ("to_null.png", "cannot be written: it is no plain file"),
        ("pipe.png", "cannot be written: it is no plain file"),
        ("circle.png", "cannot be written: .*links"),
        ("nowhere.png", "output folder .*missing does not exist; make it first"),
    ]:
        with pytest.raises(ValueError, match=f"^[^\n]*{says}[^\n]*$"):
            check_writable(tmp_path / name)
        with pytest.raises(OSError, match="."):
            write(tmp_path / name, b"x")
    assert names(tmp_path) == before
    assert not Path("/dev/null").is_file()


def test_what_cannot_be_written_is_told_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for path, says in [
        (tmp_path / "missing" / "a.png", f"^output folder {tmp_path / 'missing'} does not exist; make it first$"),
        (tmp_path / "file" / "a.png", "cannot be written: Not a directory$"),
        (tmp_path / ("a" * 256), "cannot be written: File name too long$"),
        (tmp_path / "a\0.png", "cannot be written: embedded null"),
    ]:
        with pytest.raises(ValueError, match=says):
            check_writable(tmp_path / "good.png", path)
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/sys is Linux's")
def test_a_folder_in_which_no_file_can_be_made_is_told():
    with pytest.raises(ValueError, match=r"^/sys/a.png cannot be written: [^\n]+$"):
        check_writable(Path("/sys/a.png"))


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    class Full:
        def __init__(self, path, mode):
            Path(path).touch()

        def __enter__(self):
            return self

        def __exit__(self, *error):
            raise OSError(28, "No space left on device")

        def write(self, data):
            pass

    monkeypatch.setattr(files, "open", Full, raising=False)
    with pytest.raises(ValueError, match="a.png cannot be written: No space left on device"):
        check_writable(tmp_path / "a.png")
    assert names(tmp_path) == []


def test_free_space_is_that_of_the_disk(tmp_path):
    assert 0 < free_space(tmp_path / "a.png") < 2**63
    assert free_space(tmp_path / "missing" / "a.png") is None


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The home folder and the temporary one."""
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir(), temporary.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    return home, temporary


def test_a_file_that_cannot_be_written_is_written_elsewhere(tmp_path, places):
    home, temporary = places
    path = tmp_path / "gone" / ("日" * 70 + ".png")
    first, why = write_somewhere(path, lambda file: file.write(b"x"))
    second, _ = write_somewhere(path, lambda file: file.write(b"y"))
    assert why == "No such file or directory"
    assert (first.read_bytes(), second.read_bytes()) == (b"x", b"y")
    assert {first.parent, second.parent} == {home}
    assert first.name.startswith("日" * 40 + "-")
    assert first.suffix == ".png"
    home.rename(tmp_path / "moved")
    third, _ = write_somewhere(path, lambda file: file.write(b"z"))
    assert third.parent == temporary
    assert third.read_bytes() == b"z"


def test_a_file_that_can_be_written_nowhere_says_why(tmp_path, places):
    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_somewhere(tmp_path / "a.png", fail)
    assert all(names(folder) == [] for folder in places)
    assert names(tmp_path) == ["home", "temporary"]
    assert write_somewhere(tmp_path / "a.png", lambda file: file.write(b"x")) == (tmp_path / "a.png", None)


def test_a_file_that_can_be_read_is_no_trouble(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    assert check_file(tmp_path / "a") is None
    with pytest.raises(ValueError, match="^no such image: "):
        check_file(tmp_path / "b", "image")


def test_names_of_more_files_keep_the_folder_and_the_ending(tmp_path):
    assert suffixed(tmp_path / "a.b.png", "phase2") == tmp_path / "a.b-phase2.png"
