"""Rounding in a metric and its closed forms against the papers' formulas in float64 NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qlora_engine.inits import initialise
from qlora_engine.rounding import (
    Feedback,
    Grid,
    coordinate_descent,
    downdate,
    drifted_target,
    gptq,
    objective,
    refit_scales,
)
from quant import QuantizedTensor, QuantSpec
from quant.scales import search_scales

Array = NDArray[np.float64]
OUT, IN, BLOCK = 6, 48, 16
FORMATS = ["nf4", "nf2", "fp4", "int3", "uint4"]


def inputs(n: int = IN) -> Array:
    rng = np.random.default_rng(5)
    return rng.standard_normal((4 * n, n)) @ rng.standard_normal((n, n)) * np.logspace(0, -1, n)


def second_moment(n: int = IN) -> Array:
    X = inputs(n)
    return X.T @ X / len(X)


class Problem:
    """One small weight in both worlds: float64 arrays (out, in), and the transposed float32 tensors."""

    def __init__(self, name: str) -> None:
        spec = QuantSpec(name, BLOCK)
        W = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3))
        scales, zeros = search_scales(W, spec)
        self.grid = Grid.of(spec, (OUT, IN), scales, zeros)
        self.target = W.T.contiguous()
        self.W: Array = W.double().numpy()
        self.H = second_moment()
        self.metric = torch.from_numpy(self.H).float()
        self.levels = self.grid.levels.double().numpy()
        self.scales = np.repeat(scales.double().numpy().reshape(OUT, -1), BLOCK, axis=1)  # (out, in)
        zero = np.zeros_like(scales) if self.grid.zeros is None else self.grid.zeros.double().numpy()
        self.zeros = np.repeat(zero.reshape(OUT, -1), BLOCK, axis=1)

    def nearest(self, x: Array, column: int) -> Array:
        values = (self.levels[None, :] - self.zeros[:, column, None]) * self.scales[:, column, None]
        return values[np.arange(OUT), np.abs(values - x[:, None]).argmin(1)]

    def value(self, codes: torch.Tensor) -> Array:
        return self.grid.values(codes).T.double().numpy()

    def error(self, Q: Array) -> float:
        E = self.W - Q
        return float(np.trace(E @ self.H @ E.T))


@pytest.mark.parametrize("name", FORMATS)
def test_gptq_in_numpy(name: str) -> None:
    """Frantar et al., arXiv:2210.17323, Algorithm 1, one column at a time, with the inverse's factor."""
    p, damping = Problem(name), 0.01
    order = np.argsort(-np.diag(p.H), kind="stable")
    H = p.H[np.ix_(order, order)] + damping * np.diag(p.H).mean() * np.eye(IN)
    U = np.linalg.cholesky(np.linalg.inv(H)).T  # H^-1 = U^T U, upper triangular
    left, Q = p.W[:, order].copy(), np.empty_like(p.W)
    for i, column in enumerate(order):
        Q[:, column] = p.nearest(left[:, i], column)
        left[:, i:] -= np.outer((left[:, i] - Q[:, column]) / U[i, i], U[i, i:])
    np.testing.assert_allclose(p.value(gptq(p.target, p.grid, Feedback.of(p.metric, damping))), Q, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_coordinate_descent_in_numpy(name: str) -> None:
    p = Problem(name)
    start = gptq(p.target, p.grid, Feedback.of(torch.eye(IN)))
    Q = p.value(start)
    errors = [p.error(Q)]
    for _ in range(2):
        for c in range(IN):
            Q[:, c] = p.nearest(Q[:, c] + ((p.W - Q) @ p.H)[:, c] / p.H[c, c], c)
            errors.append(p.error(Q))
    # the starting values are rounded to float32, the new ones not
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]
    swept = coordinate_descent(p.target, start, p.grid, p.metric, sweeps=2)
    np.testing.assert_allclose(p.value(swept), Q, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_refit_in_numpy(name: str) -> None:
    """Least squares on (W - Q) H^(1/2), row by row."""
    p = Problem(name)
    codes = gptq(p.target, p.grid, Feedback.of(torch.eye(IN)))
    units = p.grid.unit_values(codes).T.double().numpy()
    L = np.linalg.cholesky(p.H)
    expected = np.empty((OUT, IN // BLOCK))
    for row in range(OUT):
        columns = [units[row, b : b + BLOCK] @ L[b : b + BLOCK] for b in range(0, IN, BLOCK)]
        expected[row] = np.linalg.lstsq(np.array(columns).T, p.W[row] @ L, rcond=None)[0]
    scales = refit_scales(p.target, codes, p.grid, p.metric).view(OUT, -1)
    np.testing.assert_allclose(scales.numpy(), expected, rtol=2e-3, atol=1e-5)


def test_downdate_in_numpy() -> None:
    """tr(E M E^T) is what the best B leaves of tr((E - B A) H (E - B A)^T)."""
    rng = np.random.default_rng(0)
    H, A, E = second_moment(), rng.standard_normal((4, IN)), rng.standard_normal((OUT, IN))
    L = np.linalg.cholesky(H)
    B = np.linalg.lstsq((A @ L).T, (E @ L).T, rcond=None)[0].T
    left = float(np.sum(((E - B @ A) @ L) ** 2))
    M = downdate(torch.from_numpy(H).float(), torch.from_numpy(A).float())
    np.testing.assert_allclose(M.numpy(), H - H @ A.T @ np.linalg.solve(A @ H @ A.T, A @ H), atol=2e-4)
    assert float(objective(torch.from_numpy(E).T.float(), M).sum()) == pytest.approx(left, rel=1e-4)


@pytest.mark.parametrize("method", ["qera", "qera-diag"])
@pytest.mark.parametrize("shape", [(64, IN), (32, IN), (IN, 80)])
def test_closed_form_in_numpy(method: str, shape: tuple[int, int]) -> None:
    """Zhang et al., arXiv:2410.06040: the SVD of (W - Q) H^(1/2), brought back with its inverse."""
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    H, rank, damping = second_moment(shape[1]), 4, 0.02
    done = initialise(
        W,
        method=method,
        rank=rank,
        spec=QuantSpec("nf4", BLOCK),
        hessian=torch.from_numpy(H).float(),
        damping=damping,
        svd="exact",
    )
    assert isinstance(done.base, QuantizedTensor)
    E = (W - done.base.dequantize()).double().numpy()
    damped = H + damping * np.diag(H).mean() * np.eye(len(H))
    if method == "qera-diag":
        damped = np.diag(np.diag(damped))
    values, vectors = np.linalg.eigh(damped)
    root = vectors * np.sqrt(values) @ vectors.T
    U, S, Vh = np.linalg.svd(E @ root)
    expected = (U[:, :rank] * S[:rank]) @ Vh[:rank] @ np.linalg.inv(root)
    BA = (done.B @ done.A).double().numpy()
    np.testing.assert_allclose(BA, expected, atol=2e-4 * np.abs(expected).max())
    norm = np.linalg.norm(W.double().numpy() @ root)
    assert done.trace[-1] == pytest.approx(np.sqrt((S[rank:] ** 2).sum()) / norm, rel=1e-4)
    left = E - BA
    exact = np.sqrt(np.trace(left @ H @ left.T) / np.trace(W.double().numpy() @ H @ W.double().numpy().T))
    assert done.output_error == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_drifted_target_in_numpy(blend: float) -> None:
    """Ridge regression of the blended output on the drifted inputs, pulled towards the weight."""
    rng = np.random.default_rng(1)
    X = inputs()
    Y = X + 0.3 * rng.standard_normal(X.shape) @ rng.standard_normal((IN, IN)) / 4
    W = rng.standard_normal((OUT, IN))
    H, cross, damping = Y.T @ Y / len(Y), Y.T @ X / len(Y), 0.02
    ridge = np.sqrt(damping * np.diag(H).mean() * len(Y)) * np.eye(IN)
    wanted = ((1 - blend) * Y + blend * X) @ W.T
    change = np.linalg.lstsq(
        np.vstack([Y, ridge]), np.vstack([wanted - Y @ W.T, np.zeros((IN, OUT))]), rcond=None
    )[0]
    tensors = (torch.from_numpy(a).float() for a in (W, H, cross))
    got = drifted_target(*tensors, blend=blend, damping=damping).double().numpy()
    np.testing.assert_allclose(got, W + change.T, atol=1e-4)
    if blend:
        assert np.linalg.norm(Y @ got.T - wanted) < 0.95 * np.linalg.norm(Y @ W.T - wanted)


def test_drifted_target_refuses() -> None:
    W, H = torch.zeros(3, 4), torch.eye(4)
    with pytest.raises(ValueError, match="expected \\(4, 4\\) twice"):
        drifted_target(W, H, torch.eye(5))
    with pytest.raises(ValueError, match="blend 2"):
        drifted_target(W, H, H, blend=2)
