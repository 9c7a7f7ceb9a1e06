"""Number formats as data: one file a format, found by looking into this folder.

A format is a table: ``value = (levels[code] - zero) * scale``. To add one, add a file that binds ``FORMAT``.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One codebook.

    Attributes:
        name: As in ``QuantSpec.format`` and on disk.
        bits: Bits a code, 2, 3, 4 or 8.
        levels: The 2**bits values by code, each exactly representable in float32.
        affine: Whether blocks also carry a zero point, subtracted from the level before scaling.
        bnb_type: bitsandbytes' ``quant_type`` that holds the same bytes, or None.
        source: Where the numbers come from.
        signed: Whether the absmax rule keeps the sign of the block's largest element, which then is +1
            in the table (the levels need not reach -1).
    """

    name: str
    bits: int
    levels: tuple[float, ...]
    affine: bool
    bnb_type: str | None
    source: str
    signed: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"format {self.name!r}: {self.bits} bits; allowed: 2, 3, 4, 8")
        if len(self.levels) != 2**self.bits:
            raise ValueError(
                f"format {self.name!r}: {len(self.levels)} levels for {self.bits} bits, not {2**self.bits}"
            )

    @functools.cached_property
    def unit(self) -> float:
        """The largest magnitude that a block's largest element can always take: absmax = unit * scale."""
        if self.signed:
            return max(self.levels)
        if self.affine:
            return max(self.levels) - min(self.levels)
        return min(max(self.levels), -min(self.levels))

    @functools.cached_property
    def zero_code(self) -> int:
        """The code whose level is nearest to 0 (the lowest such code): what padding is filled with."""
        return min(range(len(self.levels)), key=lambda code: (abs(self.levels[code]), code))


@functools.cache
def _formats() -> dict[str, Format]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        fmt = importlib.import_module(f"{__name__}.{module.name}").FORMAT
        if fmt.name != module.name:
            raise ValueError(f"formats/{module.name}.py defines a format named {fmt.name!r}")
        found[fmt.name] = fmt
    return found


def names() -> tuple[str, ...]:
    """All known formats, in alphabetical order."""
    return tuple(sorted(_formats()))


def get(name: str) -> Format:
    """The format called ``name``; ValueError lists the known ones."""
    try:
        return _formats()[name]
    except KeyError:
        raise ValueError(f"unknown format {name!r}; known formats: {', '.join(names())}") from None
