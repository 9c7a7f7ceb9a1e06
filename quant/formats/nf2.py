"""NF2: the NF4 construction at 2 bits, as LoftQ uses it, rounded to float32."""

from quant.formats import Format

FORMAT = Format(
    name="nf2",
    bits=2,
    levels=(
        -1.0,
        0.0,
        0.33791518211364746,
        1.0,
    ),
    affine=False,
    bnb_type=None,
    source="norm.ppf, offset 0.9677083, exact zero (arXiv:2305.14314, appendix E; LoftQ, arXiv:2310.08659)",
)
