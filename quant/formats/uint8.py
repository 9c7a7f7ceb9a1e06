"""uint8: affine integers; a block's zero point is an integer in [0, 255]."""

from quant.formats import Format

FORMAT = Format(
    name="uint8",
    bits=8,
    levels=tuple(float(value) for value in range(256)),
    affine=True,
    bnb_type=None,
    source="the integers 0 ... 255, with a zero point",
)
