"""int3: symmetric integers; code = value + 4."""

from quant.formats import Format

FORMAT = Format(
    name="int3",
    bits=3,
    levels=tuple(float(value) for value in range(-4, 4)),
    affine=False,
    bnb_type=None,
    source="the integers -4 ... 3",
)
