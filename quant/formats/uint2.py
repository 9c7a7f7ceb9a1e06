"""uint2: affine integers; a block's zero point is in [0, 3], in steps of 1/64."""

from quant.formats import Format

FORMAT = Format(
    name="uint2",
    bits=2,
    levels=tuple(float(value) for value in range(4)),
    affine=True,
    bnb_type=None,
    source="the integers 0 ... 3, with a zero point",
)
