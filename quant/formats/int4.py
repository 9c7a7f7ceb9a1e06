"""int4: symmetric integers; code = value + 8."""

from quant.formats import Format

FORMAT = Format(
    name="int4",
    bits=4,
    levels=tuple(float(value) for value in range(-8, 8)),
    affine=False,
    bnb_type=None,
    source="the integers -8 ... 7",
)
