"""The folder that a run writes: whether it may be used, and what of an earlier run in it goes.

A run puts its checkpoints into a folder of a common name, ``OUTPUT/checkpoints``: what lies there and was not
written by a run is left alone.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from qlora_engine.errors import InputError

CHECKPOINTS = "checkpoints"
SETTINGS_FILE = "settings.json"
COMPLETE = "complete.json"  # written last into a checkpoint: a folder without it was cut off
_OURS = re.compile(r"checkpoint-\d+|settings\.json\.tmp|runs")  # runs: Trainer's event files


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that cannot be written, or that holds what this run would take away.

    Raises:
        InputError: it cannot be used, holds a run and neither option is given, or none to resume.
    """
    if resume and overwrite:
        raise InputError("--resume goes on with a run, --overwrite begins anew: give one of them")
    checkpoints = output / CHECKPOINTS
    for path in (output, checkpoints):
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path} is a link to nothing; a folder is needed there")
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is not a folder; one is needed there")
        if path.exists() and not os.access(path, os.W_OK | os.X_OK):
            raise InputError(f"{path} cannot be written to: no permission")
    if resume:
        return check_resumable(checkpoints)
    # A run that was cut off before its settings were written has left nothing to go on from.
    started = (checkpoints / SETTINGS_FILE).exists() or (output / "adapter_config.json").exists()
    if started and not overwrite:
        raise InputError(f"{output} holds a run already; --resume goes on with it, --overwrite begins anew")
    check_not_foreign(checkpoints)


def check_resumable(checkpoints: Path) -> None:
    """Refuse to resume where no run has written its settings.

    Raises:
        InputError: there are none.
    """
    if not (checkpoints / SETTINGS_FILE).is_file():
        raise InputError(f"nothing to resume in {checkpoints.parent}: no {SETTINGS_FILE}")


def check_not_foreign(checkpoints: Path) -> None:
    """Refuse a folder of checkpoints that no run of this command has begun.

    Raises:
        InputError: something is in it, and no settings of a run.
    """
    if not checkpoints.is_dir() or (checkpoints / SETTINGS_FILE).is_file():
        return
    found = sorted(path.name for path in checkpoints.iterdir() if path.name != f"{SETTINGS_FILE}.tmp")
    if found:
        raise InputError(
            f"{checkpoints} holds '{found[0]}' and no {SETTINGS_FILE}: no run of qlora-finetune has written "
            "it, and its place is needed; give another --output"
        )


def clear_checkpoints(checkpoints: Path) -> None:
    """Remove what a run has written into ``checkpoints``, and nothing else.

    Its settings stay until others are written in their place: killed meanwhile, it is still a run's folder.
    The mark of a checkpoint goes first: one that is half removed is no checkpoint any more.

    Raises:
        InputError: it is not a run's.
    """
    check_not_foreign(checkpoints)
    if not checkpoints.is_dir():
        return
    for path in checkpoints.iterdir():
        if not _OURS.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            (path / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(path)
        else:
            path.unlink()
