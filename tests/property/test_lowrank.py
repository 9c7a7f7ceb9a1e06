"""Properties of the truncated SVD over random shapes, ranks and spectra."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_engine.lowrank import LowRankFactors, truncated_svd


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    m, n = draw(st.integers(1, 260)), draw(st.integers(1, 260))
    rank = draw(st.integers(1, min(m, n)))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    M = rng.standard_normal((m, n)) * 10.0 ** draw(st.integers(-12, 12))
    for _ in range(draw(st.integers(0, 2))):  # spikes
        M += np.outer(rng.standard_normal(m), rng.standard_normal(n)) * np.abs(M).max() * 10
    if draw(st.booleans()):  # dependent rows
        M[m // 2 :] = M[: m - m // 2][::-1]
    if draw(st.booleans()):  # dead columns
        M[:, : n // 3] = 0
    return torch.from_numpy(M).float(), rank


@settings(max_examples=60)
@given(problems(), st.sampled_from(["fast", "exact"]))
def test_truncated_svd_is_within_a_thousandth_of_the_best(
    problem: tuple[torch.Tensor, int], method: str
) -> None:
    M, rank = problem
    U, S, Vh = (t.double().numpy() for t in truncated_svd(M, rank, method=method))
    wide = M.double().numpy()
    best = np.sqrt(np.square(np.linalg.svd(wide, compute_uv=False)[rank:]).sum())
    left = np.linalg.norm(wide - (U * S) @ Vh)
    rounding = max(M.shape) * torch.finfo(torch.float32).eps  # LAPACK's own bound for float32
    assert left <= 1.001 * best + rounding * np.linalg.norm(wide)


@settings(max_examples=30)
@given(problems(), st.floats(0.01, 100))
def test_factors_scale_with_the_matrix(problem: tuple[torch.Tensor, int], scaling: float) -> None:
    M, rank = problem
    factors = LowRankFactors.from_svd(*truncated_svd(M, rank))
    product = factors.product()
    tolerance = 1e-5 * float(M.abs().max()) * M.shape[1]
    torch.testing.assert_close(
        factors.divided(scaling).product() * scaling, product, rtol=1e-4, atol=tolerance
    )
