"""Rounding in a metric on drawn shapes, formats and spectra: nothing gets worse or leaves the grid."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_engine.inits import initialise
from qlora_engine.rounding import (
    Feedback,
    Grid,
    anneal,
    coordinate_descent,
    downdate,
    gptq,
    objective,
    refit_scales,
)
from quant import QuantSpec, formats
from quant.scales import search_scales

SLACK = 1 + 1e-5  # float32's rounding of the objective


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Grid, Tensor]:
    """Transposed target, grid and metric; sometimes singular, dead in places, or with zero blocks."""
    out_features, in_features = draw(st.integers(1, 12)), draw(st.integers(1, 160))
    spec = QuantSpec(draw(st.sampled_from(formats.names())), draw(st.sampled_from([16, 32, 64, 128])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    W = torch.randn(out_features, in_features, generator=generator) * 10.0 ** draw(st.integers(-4, 2))
    W[torch.rand(out_features, generator=generator) < 0.1] = 0
    tokens = draw(st.sampled_from([1, in_features, 4 * in_features]))
    X = torch.randn(tokens, in_features, generator=generator)
    X *= torch.logspace(0, -draw(st.integers(0, 3)), in_features)
    X[:, torch.rand(in_features, generator=generator) < draw(st.sampled_from([0.0, 0.2]))] = 0
    scales, zeros = search_scales(W, spec, draw(st.booleans()))
    H = X.T @ X / tokens
    H += 1e-4 * H.diagonal().mean() * torch.diag((H.diagonal() > 0).float())  # the solvers damp by far more
    return W.T.contiguous(), Grid.of(spec, (out_features, in_features), scales, zeros), H


def cost(target: Tensor, codes: Tensor, grid: Grid, metric: Tensor) -> Tensor:
    return objective((target - grid.values(codes)).double(), metric.double())


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 2**20))
def test_no_step_makes_a_row_worse(problem: tuple[Tensor, Grid, Tensor], seed: int) -> None:
    target, grid, metric = problem
    # A sum of many products that cancel is known to float32's rounding of the products, not of the sum.
    floor = 1e-6 * objective(target.double().abs(), metric.double().abs())
    floor += torch.finfo(torch.float32).tiny  # below, every cost is zero in float32: rows of zeros
    codes = gptq(target, grid, Feedback.of(metric))
    assert int(codes.max()) < len(grid.levels)
    before = cost(target, codes, grid, metric)
    swept = coordinate_descent(target, codes, grid, metric)
    after = cost(target, swept, grid, metric)
    assert (after <= before * SLACK + floor).all()
    generator = torch.Generator().manual_seed(seed)
    cooled = anneal(target, swept, grid, metric, sweeps=3, temperature=0.2, generator=generator)
    annealed = cost(target, cooled, grid, metric)
    assert (annealed <= after * SLACK + floor).all()
    refitted = grid.with_scales(refit_scales(target, cooled, grid, metric))
    assert torch.isfinite(refitted.scales).all()
    assert cost(target, cooled, refitted, metric).sum() <= annealed.sum() * SLACK + floor.sum()


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(1, 8), st.integers(0, 2**20))
def test_downdated_metric_is_what_the_best_b_leaves(
    problem: tuple[Tensor, Grid, Tensor], rank: int, seed: int
) -> None:
    """Between nothing and H, and the best B reaches it."""
    target, _, H = problem
    H = H.double() + 0.01 * H.diagonal().mean().double() * torch.eye(len(H), dtype=torch.float64)
    if not bool(H.diagonal().mean() > 0):
        return
    A = torch.randn(rank, len(H), generator=torch.Generator().manual_seed(seed)).double()
    M = downdate(H.float(), A.float()).double()
    E = target.double()  # (in, out)
    G = A @ H @ A.T
    B = torch.linalg.lstsq(G, A @ H @ E).solution if rank <= len(H) else torch.linalg.pinv(G) @ (A @ H @ E)
    left = objective(E - A.T @ B, H)
    whole = objective(E, H)
    assert (objective(E, M) <= whole * (1 + 1e-5)).all()
    assert torch.allclose(objective(E, M), left, rtol=1e-3, atol=float(1e-5 * whole.max()))


@settings(max_examples=12, deadline=None)
@given(
    st.integers(4, 40),
    st.integers(4, 90),
    st.sampled_from(["nf4", "nf2", "uint3", "fp4"]),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_the_recipe_is_never_worse_than_qera(
    out_features: int, in_features: int, name: str, double_quant: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out_features, in_features, generator=generator)
    X = torch.randn(2 * in_features, in_features, generator=generator) * torch.logspace(0, -1, in_features)
    spec, H = QuantSpec(name, 32, double_quant), X.T @ X / len(X)
    rank = min(4, out_features, in_features)
    recipe, qera = (
        initialise(W, method=method, rank=rank, spec=spec, hessian=H, iters=3)
        for method in ("recipe", "qera")
    )
    assert recipe.output_error is not None
    assert qera.output_error is not None
    assert recipe.output_error <= qera.output_error + 1e-6
