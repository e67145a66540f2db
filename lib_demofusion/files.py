"""Files: what can be read and written is told before anything is computed, and a file is written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lib_demofusion.config import first_line

LONGEST_STEM = 40  # characters that a name keeps of the one that could not be written; four bytes each fit everywhere


def check_file(path: Path, what: str = "file") -> None:
    """Raises ValueError, one line, unless path is a plain file that can be read. what: what it should be."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # before it is opened: a pipe would wait for ever
            raise OSError(f"it is {_kind(mode)}")
        with open(path, "rb") as file:
            file.read(1)
    except FileNotFoundError:
        raise ValueError(f"no such {what}: {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ValueError(f"{path} cannot be read: {reason(error)}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to write to, which becomes `path` if all goes well and is gone if not.

    Until then it has a short name in the same folder that no other run has. A symbolic link stays, and what it points
    to is written. Raises OSError, also where something else than a plain file has the name.
    """
    target = _target(path)
    part = _new_name(target.parent)
    file = open(part, "xb")  # noqa: SIM115, closed below, before it gets its name
    try:
        with file:
            yield file
        os.replace(part, target)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_somewhere(path: Path, write: Callable[[BinaryIO], None]) -> tuple[Path, str | None]:
    """Write a whole file to `path` or, if that fails, in the home folder or the system's temporary one, under a new name.

    Returns where it is, and why it is not at `path` if it is not. Raises what `path` raised if it can be written nowhere.
    """
    try:
        with whole_file(path) as file:
            write(file)
        return path, None
    except Exception as error:
        name = f"{path.stem[:LONGEST_STEM]}-{secrets.token_hex(4)}{path.suffix}"
        for folder in (Path.home, tempfile.gettempdir):
            with suppress(Exception):
                place = Path(folder()) / name
                with whole_file(place) as file:
                    write(file)
                return place, reason(error)
        raise


def check_writable(*paths: Path) -> None:
    """Raises ValueError, one line, for the first of these paths that cannot be written. Leaves nothing behind.

    A file of another name is written in each folder, so that none of these is touched.
    """
    for path in paths:
        try:
            target = _target(path)
            missing = [folder for folder in (path.parent, target.parent) if not folder.exists()]
            if not missing:
                _try_folder(target.parent)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise ValueError(f"{path} cannot be written: {reason(error)}") from error
        if missing:
            raise ValueError(f"output folder {missing[0]} does not exist; make it first")


def _try_folder(folder: Path) -> None:
    part = _new_name(folder)
    try:
        with open(part, "xb") as file:
            file.write(bytes(4096))
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def free_space(path: Path) -> int | None:
    """Bytes that are free where `path` is written; None where the system does not say."""
    try:
        usage = shutil.disk_usage(_through_links(path).parent)
    except OSError:
        return None
    return usage.free if usage.total else None


def suffixed(path: Path, suffix: str) -> Path:
    """folder/name.png -> folder/name-suffix.png."""
    return path.with_name(f"{path.stem}-{suffix}{path.suffix}")


def reason(error: BaseException) -> str:
    """Why a file cannot be read or written, in one line, without the path that stands before it anyway."""
    return getattr(error, "strerror", None) or first_line(error)


def _new_name(folder: Path) -> Path:
    return folder / f".demofusion-{secrets.token_hex(8)}.part"


def _through_links(path: Path) -> Path:
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _target(path: Path) -> Path:
    """Where what is written to `path` goes. Raises OSError if it leads in a circle, or to what is no plain file."""
    with suppress(FileNotFoundError):  # a new file, or a link to one
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(f"it is {_kind(mode)}")
    return _through_links(path)


def _kind(mode: int) -> str:
    return "a folder" if stat.S_ISDIR(mode) else "no plain file"
