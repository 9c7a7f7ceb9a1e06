"""Rounding in a metric: GPTQ, coordinate descent and the joint refit of scales, for every format."""

from .drift import drifted_target
from .grid import Grid
from .metric import cholesky, damp, downdate, objective
from .refit import refit_scales
from .sweep import Feedback, anneal, coordinate_descent, gptq

__all__ = [
    "Feedback",
    "Grid",
    "anneal",
    "cholesky",
    "coordinate_descent",
    "damp",
    "downdate",
    "drifted_target",
    "gptq",
    "objective",
    "refit_scales",
]
