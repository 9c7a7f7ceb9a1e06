"""Whether a regular expression from a stranger's file could take for ever; Python's have no time limit.

Matching backtracks: a repeat within a repeat, or alternatives within one, can try exponentially many ways to
cut a name of 30 letters. Such patterns are not needed to name modules.
"""

from __future__ import annotations

import re
import sys
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as sre_constants  # type: ignore[attr-defined]
    from re import _parser as sre_parse  # type: ignore[attr-defined]
else:
    import sre_constants
    import sre_parse

MAX_LENGTH = 2000  # of one pattern
MAX_REPEATS = 6  # in one pattern: each multiplies the ways by the length of the name
_MANY = 16  # repeats of at most so many are not counted
_REPEATS = (sre_constants.MAX_REPEAT, sre_constants.MIN_REPEAT)


def why_slow(pattern: str) -> str | None:
    """Why ``pattern`` could take for ever on a module name; None where it cannot.

    Raises:
        re.error: no regular expression.
    """
    if len(pattern) > MAX_LENGTH:
        return f"{len(pattern)} characters, more than {MAX_LENGTH}"
    try:
        tree = sre_parse.parse(pattern)
    except (RecursionError, OverflowError) as error:
        raise re.error(str(error)) from error
    count = [0]
    reason = _look(tree, False, count)
    if reason is None and count[0] > MAX_REPEATS:
        return f"{count[0]} repeats, more than {MAX_REPEATS}"
    return reason


def _look(tree: Any, inside: bool, count: list[int]) -> str | None:
    for operation, argument in tree:
        parts, repeats = _parts(operation, argument), False
        if operation in _REPEATS:
            repeats = argument[1] > _MANY
            count[0] += repeats
            if inside and repeats:
                return "a repeat within a repeat"
        if operation is sre_constants.BRANCH and inside:
            return "alternatives within a repeat"
        for part in parts:
            if reason := _look(part, inside or repeats, count):
                return reason
    return None


def _parts(operation: Any, argument: Any) -> list[Any]:
    """The patterns within one."""
    if operation is sre_constants.BRANCH:
        return list(argument[1])
    if isinstance(argument, sre_parse.SubPattern):
        return [argument]
    if isinstance(argument, tuple):
        return [part for part in argument if isinstance(part, sre_parse.SubPattern)]
    return []
