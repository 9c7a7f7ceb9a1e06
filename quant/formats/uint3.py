"""uint3: affine integers; a block's zero point is in [0, 7], in steps of 1/32."""

from quant.formats import Format

FORMAT = Format(
    name="uint3",
    bits=3,
    levels=tuple(float(value) for value in range(8)),
    affine=True,
    bnb_type=None,
    source="the integers 0 ... 7, with a zero point",
)
