"""Old training checkpoints go only once newer ones are whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qlora_engine.training.output import COMPLETE
from qlora_engine.training.trainer import latest_checkpoint, remove_old_checkpoints


@pytest.mark.parametrize(
    ("keep", "spare", "left"),
    [
        (2, (), [9, 10]),
        (1, (), [10]),
        (1, ("checkpoint-3",), [3, 10]),
        (3, ("checkpoint-3",), [3, 9, 10]),
        (9, (), [3, 8, 9, 10]),
    ],
)
def test_the_newest_and_the_best_stay(
    keep: int, spare: tuple[str, ...], left: list[int], tmp_path: Path
) -> None:
    for step in (3, 8, 9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    (tmp_path / "checkpoint-old").mkdir()  # not ours
    remove_old_checkpoints(tmp_path, keep, spare)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-old"} | {
        f"checkpoint-{step}" for step in left
    }


def test_a_half_removed_one_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
        (tmp_path / f"checkpoint-{step}" / "weights").touch()

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_old_checkpoints(tmp_path, 1)
    monkeypatch.undo()
    (tmp_path / "checkpoint-2" / COMPLETE).unlink()
    assert latest_checkpoint(tmp_path) is None
