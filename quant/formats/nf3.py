"""NF3: the NF4 construction at 3 bits, as LoftQ uses it, rounded to float32."""

from quant.formats import Format

FORMAT = Format(
    name="nf3",
    bits=3,
    levels=(
        -1.0,
        -0.4786291718482971,
        -0.21714182198047638,
        0.0,
        0.16093017160892487,
        0.33791518211364746,
        0.5626169443130493,
        1.0,
    ),
    affine=False,
    bnb_type=None,
    source="norm.ppf, offset 0.9677083, exact zero (arXiv:2305.14314, appendix E; LoftQ, arXiv:2310.08659)",
)
