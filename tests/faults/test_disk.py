"""A disk that is full or closed: one clear line, nothing that looks whole, and going on works afterwards."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.child import Fault, run
from tests.faults.scenes import Scene, Scenes, cases

NAMES = ("init", "init-calibrated", "merge", "merge-requantised")
FULL = "No space left on device"


def check_refused(scene: Scene, folder: Path, message: str) -> None:
    """No output, and the message names the way on if there is something to go on with."""
    assert FULL in message
    assert not (folder / "out").exists()
    kept = (folder / ".out.unfinished" / "run.json").exists()
    assert ("--resume goes on" in message) == kept


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(name, 2, id=f"{name}-few") for name in ("init", "merge")]
    + [pytest.param(name, 25, marks=pytest.mark.slow, id=f"{name}-many") for name in NAMES],
)
def test_full_at_any_byte(
    name: str, kind: int, scenes: Scenes, tmp_path: Path, chance: random.Random, tell: Callable[[str], None]
) -> None:
    """Python's writes stop in the middle of whatever is being written."""
    scene, refused = scenes[name], 0
    size = sum(map(len, scene.wanted.values()))
    for case in range(cases(kind)):
        folder = tmp_path / str(case)
        result = scene.run(folder, fault=Fault(full_after_bytes=int(chance.random() * size)))
        check_refused(scene, folder, result.error(scene.program))
        refused += 1
        assert scene.go_on(folder).code == 0
        scene.check_finished(folder)
        shutil.rmtree(folder)
    tell(f"{refused} full disks")


@pytest.mark.parametrize(
    "name", ["merge", *(pytest.param(n, marks=pytest.mark.slow) for n in ("init", "finetune"))]
)
def test_full_when_flushing(name: str, scenes: Scenes, tmp_path: Path, chance: random.Random) -> None:
    """Delayed allocation: the disk says so at fsync, and goes on saying so while the error is handled."""
    scene = scenes[name]
    folder = tmp_path / "work"
    result = scene.run(folder, fault=Fault(full_at=chance.randrange(scene.changes // 2)))
    assert FULL in result.error(scene.program)
    assert scene.go_on(folder).code == 0
    scene.check_finished(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``small_disk(kilobytes)``: an empty file system of that size."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_small_disk_under_finetune(
    scenes: Scenes, small_disk: Callable[[int], Path], tell: Callable[[str], None]
) -> None:
    """Here torch writes, too, which no wrapper of Python's writes sees. tmpfs gives whole pages."""
    scene, refused = scenes["finetune"], 0
    for kilobytes in range(60, 500, 30):
        disk = small_disk(kilobytes)
        result = scene.run(disk / "work")
        if result.code == 0:
            break
        message = result.error(scene.program)
        assert FULL in message, message
        assert "losses" not in scene.contents(disk / "work")  # the log says that a run is whole
        refused += 1
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert scene.go_on(disk / "work").code == 0
        assert scene.contents(disk / "work") == scene.wanted
    assert refused >= 3
    tell(f"{refused} full disks")


@pytest.mark.parametrize(
    "name",
    ["init", pytest.param("merge", marks=pytest.mark.slow), pytest.param("finetune", marks=pytest.mark.slow)],
)
def test_closed_folder(name: str, scenes: Scenes, tmp_path: Path) -> None:
    """A read-only file system refuses root, too."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", disk]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        scene = scenes[name]
        words = [disk / "out" if word == "out" else word for word in scene.arguments]
        message = run(scene.program, *words, folder=tmp_path).error(scene.program)
        assert str(disk) in message
        assert "no permission" in message or "Read-only file system" in message
    finally:
        subprocess.run(["umount", disk], check=True)
