"""FP4: sign, two exponent bits, one mantissa bit, divided by 12; codes 0 and 8 are both zero."""

from quant.formats import Format

FORMAT = Format(
    name="fp4",
    bits=4,
    levels=(
        0.0,
        0.0052083334885537624,
        0.6666666865348816,
        1.0,
        0.3333333432674408,
        0.5,
        0.1666666716337204,
        0.25,
        -0.0,
        -0.0052083334885537624,
        -0.6666666865348816,
        -1.0,
        -0.3333333432674408,
        -0.5,
        -0.1666666716337204,
        -0.25,
    ),
    affine=False,
    bnb_type="fp4",
    source="bitsandbytes get_4bit_type('fp4'), (0, .0625, 8, 12, 4, 6, 2, 3) / 12 and their negatives",
)
