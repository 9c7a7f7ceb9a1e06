"""BOF3: the block-wise optimal codebook for Gaussian weights divided by their signed absmax.

The largest element of a block is +1 whatever its sign, so the levels need not reach -1. Zero and one are
fixed; each other level is the mean of what is rounded to it, weighted by absmax**2.
"""

from quant.formats import Format

FORMAT = Format(
    name="bof3",
    bits=3,
    levels=(
        -0.7107486128807068,
        -0.4199059307575226,
        -0.19825232028961182,
        0.0,
        0.17960608005523682,
        0.3762563467025757,
        0.6191869974136353,
        1.0,
    ),
    affine=False,
    bnb_type=None,
    source="the construction of arXiv:2505.06653 (BOF4-S, squared error, blocks of 64) at 3 bits",
    signed=True,
)
