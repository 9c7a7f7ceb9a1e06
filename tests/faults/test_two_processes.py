"""Two processes on one output folder: the second is refused, and a dead one's lock binds nobody."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.faults.child import Fault, Process, run
from tests.faults.scenes import Scene, Scenes

NAMES = ("init", "init-calibrated", "finetune")


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP has taken hold."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def start_and_stop(scene: Scene, folder: Path, part: float) -> Process:
    """A run that stands still after ``part`` of its changes of the disk."""
    process = scene.start(folder, fault=Fault(pause_at=int(part * scene.changes)))
    for _ in range(6000):
        if is_stopped(process.pid):
            return process
        time.sleep(0.02)
    raise AssertionError("never got there")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("init", 0.5),
        ("init-calibrated", 0.03),  # while it calibrates
        pytest.param("init", 0.03, marks=pytest.mark.slow),
        pytest.param("init-calibrated", 0.5, marks=pytest.mark.slow),
        *(
            pytest.param(name, at, marks=pytest.mark.slow)
            for name in ("merge", "finetune")
            for at in (0.03, 0.5)
        ),
    ],
)
def test_the_second_is_refused(name: str, part: float, scenes: Scenes, tmp_path: Path) -> None:
    scene, folder = scenes[name], tmp_path / "work"
    first = start_and_stop(scene, folder, part)
    before = sorted(path for path in folder.rglob("*"))
    try:
        for flags in ((), ("--resume",), ("--overwrite",)):
            # its logs are its own: it runs in another folder and names the output by its whole path
            words = [folder / "out" if word == "out" else word for word in scene.arguments]
            message = run(scene.program, *words, *flags, folder=tmp_path).error(scene.program)
            assert f"another process (process {first.pid}) is writing" in message, message
            assert sorted(path for path in folder.rglob("*")) == before
    finally:
        first.send(signal.SIGCONT)
    assert first.finish().code == 0
    scene.check_finished(folder)


@pytest.mark.parametrize("name", ["merge", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES)])
def test_a_lock_ends_with_its_process(name: str, scenes: Scenes, tmp_path: Path) -> None:
    scene, folder = scenes[name], tmp_path / "work"
    first = start_and_stop(scene, folder, 0.5)
    first.send(signal.SIGKILL)
    assert first.finish().code == -signal.SIGKILL
    result = scene.go_on(folder)
    assert result.code == 0, result.err
    scene.check_finished(folder)
