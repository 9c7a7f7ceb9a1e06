"""uint4: affine integers; a block's zero point is in [0, 15], in steps of 1/16."""

from quant.formats import Format

FORMAT = Format(
    name="uint4",
    bits=4,
    levels=tuple(float(value) for value in range(16)),
    affine=True,
    bnb_type=None,
    source="the integers 0 ... 15, with a zero point",
)
