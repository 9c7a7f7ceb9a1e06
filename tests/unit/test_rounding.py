"""Rounding in a metric: every format and block layout, and the inputs that break careless code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_engine import rounding
from qlora_engine.rounding import (
    Feedback,
    Grid,
    anneal,
    coordinate_descent,
    downdate,
    gptq,
    objective,
    refit_scales,
    sweep,
)
from quant import QuantSpec, formats
from quant.scales import search_scales
from quant.tensor import encode, from_codes

FORMATS = formats.names()
# rows of whole blocks; blocks that straddle rows; several rows a block; a short last block
LAYOUTS = [(24, 128, 32), (24, 72, 64), (24, 40, 128), (7, 33, 16)]


def metric_of(n: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """Second moment of correlated inputs with a falling spectrum, of full rank unless told."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(rank or 4 * n, n, generator=generator) @ torch.randn(n, n, generator=generator)
    X = X * torch.logspace(0, -1, n)
    return X.T @ X / X.shape[0]


def problem(name: str, layout: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Grid, Tensor]:
    """Transposed target, grid with searched scales, metric."""
    out_features, in_features, block_size = layout
    spec = QuantSpec(name, block_size)
    W = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))
    W[1] *= 3
    scales, zeros = search_scales(W, spec, True)
    return W.T.contiguous(), Grid.of(spec, (out_features, in_features), scales, zeros), metric_of(in_features)


def nearest(target: Tensor, grid: Grid) -> Tensor:
    """Codes of the nearest values, found by trying all."""
    tried = torch.stack([grid.values(torch.full(target.shape, i)) for i in range(len(grid.levels))])
    return (tried - target).abs().argmin(0).to(torch.uint8)


def cost(target: Tensor, codes: Tensor, grid: Grid, metric: Tensor) -> Tensor:
    return objective((target - grid.values(codes)).double(), metric.double())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grid_values_are_those_of_the_stored_tensor(name: str, layout: tuple[int, int, int]) -> None:
    out_features, in_features, block_size = layout
    spec = QuantSpec(name, block_size)
    W = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(1))
    scales, zeros = search_scales(W, spec, True)
    flat = encode(W, spec, scales, zeros)
    stored = from_codes(flat, scales, spec, W.shape, torch.float32, zeros).dequantize()
    codes = flat.view(W.shape).T.contiguous()
    grid = Grid.of(spec, (out_features, in_features), scales, zeros)
    torch.testing.assert_close(grid.values(codes).T, stored, rtol=1e-6, atol=1e-7)


def test_grid_refuses_the_wrong_number_of_scales() -> None:
    with pytest.raises(ValueError, match="has 8 scales, got"):
        Grid.of(QuantSpec("nf4", 64), (4, 128), torch.ones(9))
    with pytest.raises(ValueError, match="zeros must be"):
        Grid.of(QuantSpec("uint4", 64), (4, 128), torch.ones(8), torch.zeros(9, dtype=torch.uint8))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gptq_in_the_identity_rounds_to_nearest(name: str, layout: tuple[int, int, int]) -> None:
    target, grid, _ = problem(name, layout)
    codes = gptq(target, grid, Feedback.of(torch.eye(target.shape[0])))
    assert codes.dtype == torch.uint8
    torch.testing.assert_close(
        (grid.values(codes) - target).abs(), (grid.values(nearest(target, grid)) - target).abs()
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_step_lowers_the_error(name: str, layout: tuple[int, int, int]) -> None:
    target, grid, metric = problem(name, layout)
    plain = cost(target, nearest(target, grid), grid, metric)
    codes = gptq(target, grid, Feedback.of(metric, 0.05))
    rounded = cost(target, codes, grid, metric)
    assert rounded.sum() < 0.9 * plain.sum()
    swept = coordinate_descent(target, codes, grid, metric, sweeps=2)
    after = cost(target, swept, grid, metric)
    assert (after <= rounded * (1 + 1e-5)).all()
    assert after.sum() < rounded.sum()
    generator = torch.Generator().manual_seed(0)
    annealed = anneal(target, swept, grid, metric, sweeps=4, temperature=0.1, generator=generator)
    assert (cost(target, annealed, grid, metric) <= after * (1 + 1e-5)).all()
    refitted = grid.with_scales(refit_scales(target, annealed, grid, metric))
    before = cost(target, annealed, grid, metric)
    fitted = cost(target, annealed, refitted, metric)
    assert fitted.sum() <= before.sum() * (1 + 1e-5)
    if grid.rows_are_whole_blocks:
        assert (fitted <= before * (1 + 1e-5)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_refit_finds_the_best_scales(layout: tuple[int, int, int]) -> None:
    """At the best scales the gradient is nil."""
    target, grid, metric = problem("nf4", layout)
    codes = nearest(target, grid)
    disturbed = grid.with_scales(grid.scales * torch.linspace(0.7, 1.2, len(grid.scales)))
    refitted = grid.with_scales(refit_scales(target, codes, disturbed, metric))
    assert cost(target, codes, refitted, metric).sum() < 0.95 * cost(target, codes, disturbed, metric).sum()
    blocks = grid.blocks_of(torch.arange(grid.shape[1]))

    def gradient(g: Grid) -> Tensor:
        each = g.unit_values(codes) * (metric @ (target - g.values(codes)))
        return torch.zeros_like(g.scales).index_add_(0, blocks.reshape(-1), each.reshape(-1))

    assert gradient(refitted).norm() < 2e-3 * gradient(disturbed).norm()


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[1]])
def test_dead_inputs_and_zero_blocks(layout: tuple[int, int, int]) -> None:
    target, grid, metric = problem("nf3", layout)
    dead = [0, 5, target.shape[0] - 1]
    metric[dead] = 0
    metric[:, dead] = 0
    target = target.clone()
    target[:32, 3] = 0
    scales = grid.scales.clone()
    scales[grid.blocks_of(torch.arange(32))[:, 3].unique()] = 0
    grid = grid.with_scales(scales)
    codes = gptq(target, grid, Feedback.of(metric))
    expected = nearest(target, grid)
    alive_scale = grid.columns(torch.tensor(dead))[0] != 0
    assert torch.equal(codes[dead][alive_scale], expected[dead][alive_scale])
    swept = coordinate_descent(target, codes, grid, metric)
    assert torch.equal(swept[dead], codes[dead])
    refitted = refit_scales(target, swept, grid, metric)
    assert torch.isfinite(refitted).all()
    assert (
        cost(target, swept, grid.with_scales(refitted), metric).sum()
        <= cost(target, swept, grid, metric).sum()
    )


@pytest.mark.parametrize("rank", [1, 5])
def test_rank_deficient_metric(rank: int) -> None:
    target, grid, _ = problem("nf2", LAYOUTS[0])
    metric = metric_of(128, rank=rank)
    plain = cost(target, nearest(target, grid), grid, metric).sum()
    codes = gptq(target, grid, Feedback.of(metric))
    rounded = cost(target, codes, grid, metric).sum()
    assert rounded < 0.2 * plain
    swept = coordinate_descent(target, codes, grid, metric)
    assert cost(target, swept, grid, metric).sum() <= rounded * (1 + 1e-4)
    assert torch.isfinite(refit_scales(target, swept, grid, metric)).all()


def test_zero_metric_changes_nothing() -> None:
    target, grid, metric = problem("nf4", LAYOUTS[0])
    codes = nearest(target, grid)
    nothing = torch.zeros_like(metric)
    assert torch.equal(coordinate_descent(target, codes, grid, nothing), codes)
    assert torch.equal(refit_scales(target, codes, grid, nothing), grid.scales)


def test_inputs_are_not_modified() -> None:
    target, grid, metric = problem("int3", LAYOUTS[0])
    codes = nearest(target, grid)
    before = [t.clone() for t in (target, metric, codes, grid.scales)]
    gptq(target, grid, Feedback.of(metric))
    generator = torch.Generator().manual_seed(0)
    anneal(target, codes, grid, metric, sweeps=2, temperature=0.3, generator=generator)
    refit_scales(target, codes, grid, metric)
    assert all(torch.equal(a, b) for a, b in zip(before, (target, metric, codes, grid.scales), strict=True))


def test_anneal_is_deterministic_and_leaves_local_minima() -> None:
    target, grid, metric = problem("nf2", (64, 128, 32))
    codes = coordinate_descent(target, gptq(target, grid, Feedback.of(metric)), grid, metric, sweeps=20)
    stuck = cost(target, codes, grid, metric).sum()
    results = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        results.append(anneal(target, codes, grid, metric, sweeps=8, temperature=0.1, generator=generator))
    assert torch.equal(*results)
    assert cost(target, results[0], grid, metric).sum() < 0.97 * stuck


def test_downdate_takes_out_what_a_can_carry() -> None:
    H = metric_of(48)
    A = torch.randn(6, 48, generator=torch.Generator().manual_seed(2))
    M = downdate(H, A)
    assert float((A @ M).norm() / (A @ H).norm()) < 1e-4
    repeated = downdate(H, torch.cat([A, A[:2], torch.zeros(1, 48)]))
    torch.testing.assert_close(repeated, M, rtol=1e-3, atol=1e-3 * float(H.diagonal().mean()))
    torch.testing.assert_close(downdate(H, torch.zeros(2, 48)), H)
    everything = downdate(H, torch.eye(48))
    assert (
        0 < float(everything.diagonal().min()) <= float(everything.diagonal().max()) < 1e-6 * float(H.max())
    )


def test_damp() -> None:
    H = metric_of(16)
    damped = rounding.damp(H, 0.5)
    torch.testing.assert_close(damped, (H + H.T) / 2 + 0.5 * H.diagonal().mean() * torch.eye(16))
    torch.testing.assert_close(rounding.damp(H.diagonal(), 0.5), damped.diagonal())
    crooked = H + torch.randn(16, 16).triu(1)
    torch.testing.assert_close(rounding.damp(crooked, 0.0), (crooked + crooked.T) / 2)
    assert torch.equal(rounding.damp(torch.zeros(4, 4), 0.01), torch.eye(4))
    assert torch.equal(rounding.damp(torch.zeros(4), 0.01), torch.ones(4))


@pytest.mark.parametrize(
    ("hessian", "damping", "message"),
    [
        (torch.ones(3, 4), 0.1, "must be"),
        (torch.full((2, 2), float("nan")), 0.1, "not finite"),
        (-torch.eye(2), 0.1, "negative diagonal"),
        (torch.eye(2), -1.0, "negative"),
    ],
)
def test_damp_refuses(hessian: Tensor, damping: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rounding.damp(hessian, damping)


def test_cholesky_escalates_damping() -> None:
    singular = metric_of(32, rank=3)
    L = rounding.cholesky(singular)
    assert L.dtype == torch.float64
    difference = (L @ L.T - singular.double()).abs().max() / singular.diagonal().mean()
    assert 0 < float(difference) < 1e-4
    with pytest.raises(ValueError, match="not positive semi-definite"):
        rounding.cholesky(torch.diag(torch.tensor([1.0, -9.0])))


def test_small_sweeps_leave_the_number_of_threads_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = sweep._loop

    def watched(*args: Any) -> Any:
        seen.append(torch.get_num_threads())
        return original(*args)

    monkeypatch.setattr(sweep, "_loop", watched)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for rows in (8, sweep._ROWS_ALONE + 8):
            W = torch.randn(rows, 64)
            spec = QuantSpec("nf2")
            scales, _ = search_scales(W, spec, True, torch.ones(64))
            gptq(W.T.contiguous(), Grid.of(spec, (rows, 64), scales), torch.eye(64))
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2]


def test_many_blocks_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block hands on to the next is what its columns hand on within it."""
    spec, (rows, columns) = QuantSpec("nf3", 32), (16, 96)
    W = torch.randn(rows, columns)
    scales, _ = search_scales(W, spec, True)
    target, grid, metric = W.T.contiguous(), Grid.of(spec, (rows, columns), scales), metric_of(columns)
    found = {}
    for size in (96, 32, 7):
        monkeypatch.setattr(sweep, "BLOCK_COLUMNS", size)
        codes = gptq(target, grid, metric)
        found[size] = (codes, coordinate_descent(target, codes, grid, metric, sweeps=3))
    for codes, swept in (found[32], found[7]):
        # sums in another order move a value across a midpoint now and then
        assert float((codes == found[96][0]).float().mean()) > 0.97
        assert float((swept == found[96][1]).float().mean()) > 0.97
        assert cost(target, codes, grid, metric).sum() < 1.02 * cost(target, found[96][0], grid, metric).sum()


def test_scales_of_one_and_of_zero() -> None:
    target = torch.randn(32, 4)
    grid = Grid.of(QuantSpec("nf4", 32), (4, 32), torch.tensor([1.0, 0.0, 1.0, 0.0]))
    for codes in (
        gptq(target, grid, torch.eye(32)),
        coordinate_descent(target, torch.zeros(32, 4, dtype=torch.uint8), grid, torch.eye(32)),
    ):
        assert torch.equal(codes[:, ::2], nearest(target, grid)[:, ::2])
        assert (codes[:, 1::2] == formats.get("nf4").zero_code).all()


def test_without_noise_no_random_number_is_drawn() -> None:
    target, grid, metric = problem("nf4", LAYOUTS[0])
    state = torch.random.get_rng_state()
    coordinate_descent(target, gptq(target, grid, metric), grid, metric)
    assert torch.equal(state, torch.random.get_rng_state())
