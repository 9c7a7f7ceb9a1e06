"""int2: symmetric integers; code = value + 2."""

from quant.formats import Format

FORMAT = Format(
    name="int2",
    bits=2,
    levels=tuple(float(value) for value in range(-2, 2)),
    affine=False,
    bnb_type=None,
    source="the integers -2 ... 1",
)
