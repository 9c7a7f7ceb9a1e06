"""Files that are either whole or absent, whatever kills the process; and text that comes from strangers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from .errors import InputError

MAX_JSON_BYTES = 200_000_000
# Python's objects take up to 100 bytes for each of these marks: a text of a few characters a value must not
# become gigabytes. A weight file of 250,000 tensors and an index of 2,000,000 stay below.
MAX_JSON_MARKS = 4_000_000


class Busy(InputError):
    """Another process holds the lock."""


def at_home(path: str | bytes | Path) -> Path:
    """``path`` with ``~`` or ``~user`` at its start as that home folder, where there is one."""
    return Path(os.path.expanduser(os.fsdecode(path)))


def file_to_write(option: str, path: Path) -> Path:
    """Where a file that the user named is to be put: behind its links.

    Files are renamed into place, and a device or a pipe (/dev/null, /dev/stdout) would be gone then.

    Args:
        option: That named it, for the error.
        path: As it was given.

    Raises:
        InputError: no ordinary file can be there.
    """
    real = Path(os.path.realpath(path))
    if real.is_dir():
        raise InputError(f"{option} {path} is a folder; give the name of a file")
    if real.exists() and not real.is_file():
        raise InputError(f"{option} {path} is a device or a pipe; give the name of an ordinary file")
    if not real.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {real.parent}")
    return real


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` (new, renamed, removed) survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make the contents of ``path`` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename_into_place(temporary: Path, path: Path) -> None:
    """Give a finished and flushed file its name, replacing any other, durably."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``path`` whole: a temporary name beside it, flush, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    rename_into_place(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """``write_text`` of indented JSON with a newline at the end."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes (not the permissions) of ``source`` to ``target`` and flush them."""
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())


def check_json_size(text: bytes) -> None:
    """Count what JSON values are made of, before any of them is.

    Raises:
        ValueError: too many to be what these files hold.
    """
    marks = sum(text.count(mark) for mark in (b",", b":", b"[", b"{"))
    if marks > MAX_JSON_MARKS:
        raise ValueError(f"{marks} values and keys, more than the {MAX_JSON_MARKS} that are accepted")


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` of json: an object that gives a key twice means two things.

    Raises:
        ValueError: a key that appears twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"'{name}' appears twice")
            seen.add(name)
    return found


def read_json_object(path: Path, *, strict: bool = False) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Args:
        path: The file.
        strict: Refuse a key that appears twice; Python's parser and others take the last.

    Raises:
        InputError: too large, not UTF-8, not JSON, nested absurdly deep, or not an object.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise InputError(f"{path} has {size} bytes; a JSON file of at most {MAX_JSON_BYTES} was expected")
    try:
        text = path.read_bytes()
        check_json_size(text)
        value = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates if strict else None)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


class Lock:
    """An exclusive lock on a file. The kernel drops it when the process ends, however it ends.

    Args:
        path: The lock file; made when missing, removed by ``release``.
        what: Named in the error, e.g. the folder that is protected.

    Raises:
        Busy: another process holds it.
        OSError: no lock can be made there; a link in its place is not followed (it might lead to a file that
            somebody wants this process to overwrite).
    """

    def __init__(self, path: Path, what: object) -> None:
        self.path = path
        while True:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = os.pread(self._handle, 32, 0).decode("ascii", "replace").strip()
                os.close(self._handle)
                holder = f" (process {owner})" if owner else ""
                raise Busy(f"another process{holder} is writing {what}; wait until it ends") from error
            except OSError as error:  # a file system without locks
                os.close(self._handle)
                raise OSError(error.errno, error.strerror, str(path)) from error
            if self._is_current():
                break
            os.close(self._handle)  # the previous holder removed this file while we opened it
        with contextlib.suppress(
            OSError
        ):  # the number only helps the reader of an error; the disk may be full
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)

    def _is_current(self) -> bool:
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        mine = os.fstat(self._handle)
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def release(self, *, remove: bool) -> None:
        """Give the lock up; ``remove`` also takes its file away (while still holding it)."""
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self._handle)
