"""int8: symmetric integers; code = value + 128."""

from quant.formats import Format

FORMAT = Format(
    name="int8",
    bits=8,
    levels=tuple(float(value) for value in range(-128, 128)),
    affine=False,
    bnb_type=None,
    source="the integers -128 ... 127",
)
