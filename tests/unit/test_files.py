"""Atomic files and the lock."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_engine.errors import InputError
from qlora_engine.files import Busy, Lock, read_json_object, write_json, write_text

HOLD = "import sys,time; from pathlib import Path; from qlora_engine.files import Lock; Lock(Path(sys.argv[1]), 'x'); print('held', flush=True); time.sleep(60)"  # noqa: E501


def test_write_text_replaces_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "one")
    write_text(path, "zwölf")
    assert path.read_text(encoding="utf-8") == "zwölf"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '{"a":' * 100_000])
def test_read_json_object_refuses(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a.json"):
        read_json_object(tmp_path / "a.json")


def test_read_json_object_refuses_a_key_twice_where_asked(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": {"b": 1, "c": 2, "b": 1}}')
    assert read_json_object(tmp_path / "a.json") == {"a": {"b": 1, "c": 2}}
    with pytest.raises(InputError, match="'b' appears twice"):
        read_json_object(tmp_path / "a.json", strict=True)


def test_write_json_round_trips(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ä": [1, 2.5, None]})
    assert read_json_object(tmp_path / "a.json") == {"ä": [1, 2.5, None]}


def test_lock_refuses_a_second_holder_and_a_crash_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Busy, match=rf"another process \(process {holder.pid}\) is writing OUT"):
        Lock(path, "OUT")
    holder.kill()
    holder.wait()
    assert path.exists()
    Lock(path, "OUT").release(remove=True)
    assert not path.exists()


def test_lock_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="lock"):
        Lock(tmp_path / "lock", "OUT")
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_file_system_without_locks_is_no_other_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="No locks available") as caught:
        Lock(tmp_path / "lock", "OUT")
    assert caught.value.filename == str(tmp_path / "lock")


def test_lock_is_not_held_on_a_removed_file(tmp_path: Path) -> None:
    """The previous holder removes its file: the lock must be on the new one."""
    first = Lock(tmp_path / "lock", "OUT")
    first.release(remove=True)
    second = Lock(tmp_path / "lock", "OUT")
    with pytest.raises(Busy):
        Lock(tmp_path / "lock", "OUT")
    second.release(remove=False)
    assert (tmp_path / "lock").exists()
