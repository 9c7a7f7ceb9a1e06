"""The one error type that means "the input is wrong", as opposed to "this program is wrong"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A problem with what the user gave: the message says what was received and what is allowed.

    Command lines print it on one line and exit with status 2; anything else is a bug and keeps its traceback.
    """


def in_short(error: BaseException) -> str:
    """What another library says of an error: its first line, and the next after a colon; else its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` where something known is near, else nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""
