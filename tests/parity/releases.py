"""What a test asks of the release of a library.

PEFT changes its numbers, fields and files from release to release; ours are those of the one in `dev`.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest


def _release(package: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return (0, 0)


def older_than(release: str, package: str = "peft") -> bool:
    """Whether what is installed is older than ``release``, such as "0.21"."""
    return _release(package) < tuple(map(int, release.split(".")))


def since(release: str, why: str, package: str = "peft") -> Any:
    """Skips a test with an older ``package``; ``why``: what is different there."""
    return pytest.mark.skipif(older_than(release, package), reason=f"{package} before {release}: {why}")


def same_settings(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Two configs, written or not, but for the release itself and for fields that only a newer PEFT has.

    What PEFT does not have must be empty in ours.
    """
    release = {"peft_version"}
    return all(ours[name] == value for name, value in theirs.items() if name not in release) and not any(
        ours[name] for name in ours.keys() - theirs.keys() - release
    )
