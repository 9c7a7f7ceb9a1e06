"""Whether a run that is to go on is the run that was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from qlora_engine import distributed
from qlora_engine.base_match import base_fingerprint
from qlora_engine.errors import InputError
from qlora_engine.files import read_json_object, write_json

from .output import SETTINGS_FILE, check_resumable, clear_checkpoints
from .settings import Settings
from .sharding import sharded_fingerprint
from .trainer import latest_checkpoint

# May change: where files lie (their rows may not), and what has no part in the losses.
_FREE_OF_ADAPTER = ("base_model_name_or_path", "inference_mode", "peft_version", "revision")
_FREE = ("data", "output", "validation", "keep", "memory_limit", "sample", "tensorboard")


def what_is_trained(model: Any) -> dict[str, Any]:
    """The base, by the hash of its codes, and the adapter's config, as far as a resumed run needs them.

    Wherever the adapter began, its weights are the checkpoint's.
    """
    base = model.get_base_model()
    fingerprint = sharded_fingerprint(base) or base_fingerprint(base)
    values = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=sorted))
    kept = {f"adapter's {key}": value for key, value in values.items() if key not in _FREE_OF_ADAPTER}
    return {"base": None if fingerprint is None else fingerprint.codes_sha256[:16], **kept}


def checkpoint_to_go_on_from(
    checkpoints: Path, settings: Settings, used: dict[str, Any], *, resume: bool
) -> Path | None:
    """The newest whole checkpoint of a run to resume; None for a new run, whose settings are written, in
    place of another run's checkpoints.

    Args:
        checkpoints: Folder of the run's checkpoints.
        settings: The run's.
        used: What they came to on this machine with these data; must not change either.
        resume: Go on with a run.

    Raises:
        InputError: nothing to resume, or another run.
    """
    stored = checkpoints / SETTINGS_FILE
    now = settings.to_json() | {"processes": distributed.world().size} | used
    now = {key: value for key, value in now.items() if key not in _FREE}
    if resume:
        check_resumable(checkpoints)
        then = read_json_object(stored)
        for key, value in now.items():
            if value != then.get(key):
                raise InputError(
                    f"--resume: {key} was {then.get(key)!r}, is {value!r}; a resumed run must be the same"
                )
        return latest_checkpoint(checkpoints)
    clear_checkpoints(checkpoints)  # another run's
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_json(stored, now)
    return None


def is_finished(checkpoint: Path, settings: Settings) -> bool:
    """Whether a checkpoint is the last one of its run, after all steps or stopped early."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if state.global_step >= state.max_steps:
        return True
    stopping: Any = state.stateful_callbacks.get("EarlyStoppingCallback", {})
    waited = stopping.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return bool(settings.early_stopping and waited >= settings.early_stopping)
