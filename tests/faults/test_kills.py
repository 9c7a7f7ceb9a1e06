"""SIGKILL at random moments: going on gives the bytes of an undisturbed run."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.child import Fault
from tests.faults.scenes import Scene, Scenes, cases

# scene: kills in the default run, kills in the slow run
KILLS = {
    "init": (2, 40),
    "init-calibrated": (0, 30),
    "merge": (1, 30),
    "merge-requantised": (0, 20),
    "finetune": (0, 24),
}


def kill_once(scene: Scene, folder: Path, chance: random.Random, *flags: str) -> bool:
    """One run, killed by the clock or before a certain change of the disk; False if it was faster."""
    if chance.random() < 0.5:
        result = scene.run(folder, *flags, kill_after=chance.random() * scene.seconds)
    else:
        result = scene.run(folder, *flags, fault=Fault(kill_at=chance.randrange(scene.changes)))
    if result.code != -signal.SIGKILL:
        assert result.code == 0 or (scene.program == "qlora-finetune" and result.code == 2), result.err
    if scene.program != "qlora-finetune":  # its output folder is also its workspace
        assert not (folder / "out").exists() or scene.contents(folder) == scene.wanted
    return result.code == -signal.SIGKILL


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(name, 0, id=f"{name}-few") for name in KILLS if KILLS[name][0]]
    + [pytest.param(name, 1, marks=pytest.mark.slow, id=f"{name}-many") for name in KILLS],
)
def test_killed_and_gone_on(
    name: str,
    kind: int,
    scenes: Scenes,
    tmp_path: Path,
    chance: random.Random,
    tell: Callable[[str], None],
) -> None:
    """Every third case is killed again while it goes on."""
    scene = scenes[name]
    kills = number = 0
    while kills < cases(KILLS[name][kind]):
        folder = tmp_path / str(number)
        kills += kill_once(scene, folder, chance)
        while chance.random() < 0.33:
            kills += kill_once(scene, folder, chance, "--resume")
        result = scene.go_on(folder)
        assert result.code == 0, (number, result.err)
        scene.check_finished(folder)
        shutil.rmtree(folder)
        number += 1
    tell(f"{kills} kills in {number} cases, {scene.changes} changes and {scene.seconds:.2f} s undisturbed")
