"""BOF4: the block-wise optimal codebook for Gaussian weights divided by their signed absmax.

The largest element of a block is +1 whatever its sign, so the levels need not reach -1. Zero and one are
fixed; each other level is the mean of what is rounded to it, weighted by absmax**2.
"""

from quant.formats import Format

FORMAT = Format(
    name="bof4",
    bits=4,
    levels=(
        -0.8568214178085327,
        -0.6691702008247375,
        -0.5234593749046326,
        -0.4004492163658142,
        -0.291034460067749,
        -0.1899917870759964,
        -0.09385576844215393,
        0.0,
        0.08876418322324753,
        0.179452583193779,
        0.27424848079681396,
        0.375949501991272,
        0.48859092593193054,
        0.6187701225280762,
        0.7790818214416504,
        1.0,
    ),
    affine=False,
    bnb_type=None,
    source="arXiv:2505.06653, BOF4-S, squared error, blocks of 64; Lloyd's iteration on the exact density",
    signed=True,
)
