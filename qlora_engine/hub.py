"""A model named by the user: a folder, or an id on the Hugging Face hub, fetched into the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from .checkpoint import CONFIG_FILE, INDEX_FILE, SIDE_FILES
from .errors import InputError, in_short
from .files import at_home

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_model(name: str, *, revision: str | None = None, code: bool = False) -> Path:
    """The folder of the model ``name``.

    A folder of that name wins and needs no network. Otherwise ``ORG/NAME`` is looked up in the hub's cache
    and on the hub (with HF_HUB_OFFLINE=1 only in the cache). Only safetensors weights are fetched.

    Args:
        name: Folder or hub id.
        revision: Branch, tag or commit on the hub.
        code: Fetch the model's own Python files, too.

    Raises:
        InputError: neither a folder nor an id; not on the hub, private, or not cached while offline.
    """
    path = at_home(name)
    if path.is_dir():
        if revision is not None:
            raise InputError(f"--revision {revision} is for models of the hub; {name} is a folder")
        return path
    if path.exists():
        raise InputError(f"{name} is a file; give the folder that holds config.json")
    if not _ID.fullmatch(name) or ".." in name:
        raise InputError(f"no such folder: {name} (and it is not a hub id like ORG/NAME)")
    return _download(name, revision, code)


def find_adapter(name: str) -> Path:
    """The folder of the adapter ``name``: a folder, or an id on the hub, as for ``find_model``.

    Raises:
        InputError: see ``find_model``.
    """
    path = at_home(name)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{name} is a file; give the folder that holds adapter_config.json")
    if not _ID.fullmatch(name) or ".." in name:
        raise InputError(f"no such folder: {name} (and it is not a hub id like ORG/NAME)")
    wanted = ["adapter_config.json", "adapter_model.safetensors", "quantization_fingerprint.json"]
    return _fetch(name, None, [*wanted, *SIDE_FILES])


def _download(name: str, revision: str | None, code: bool) -> Path:
    wanted = [
        CONFIG_FILE,
        "model*.safetensors",
        INDEX_FILE,
        *SIDE_FILES,
        *(["*.py"] if code else []),
    ]
    return _fetch(name, revision, wanted)


def _fetch(name: str, revision: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise InputError(
            f"no folder named {name}; the hub's cache lacks it and the hub cannot be reached (offline?)"
        ) from error
    except HfHubHTTPError as error:
        raise InputError(f"no folder named {name}, and the hub refused it: {in_short(error)}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"no folder named {name}, and fetching it from the hub failed: {error}") from error
