"""BOF2: the block-wise optimal codebook for Gaussian weights divided by their signed absmax.

The largest element of a block is +1 whatever its sign, so the levels need not reach -1. Zero and one are
fixed; each other level is the mean of what is rounded to it, weighted by absmax**2.
"""

from quant.formats import Format

FORMAT = Format(
    name="bof2",
    bits=2,
    levels=(
        -0.44558703899383545,
        0.0,
        0.3774058520793915,
        1.0,
    ),
    affine=False,
    bnb_type=None,
    source="the construction of arXiv:2505.06653 (BOF4-S, squared error, blocks of 64) at 2 bits",
    signed=True,
)
