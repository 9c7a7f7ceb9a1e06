"""The truncated SVD against the exact one, and the factors made from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_engine.errors import InputError
from qlora_engine.lowrank import LowRankFactors, _extension, _orthogonalised, check_rank, truncated_svd

# Plus float32's rounding of the whole: what is left of a matrix of lower rank is nothing else.
ROUNDING = 5e-6


def optimum(M: Tensor, rank: int) -> float:
    """Frobenius norm of what the best rank-``rank`` matrix leaves, in float64."""
    return float(torch.linalg.svdvals(M.double())[rank:].square().sum().sqrt())


def left_over(M: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> float:
    return float((M.double() - (U.double() * S.double()) @ Vh.double()).norm())


def with_spectrum(m: int, n: int, singular_values: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    k = singular_values.numel()
    U = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]
    return ((U * singular_values.double()) @ V.T).float()


def gaussian(m: int, n: int) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(11))


def heavy_tailed(m: int, n: int) -> Tensor:
    """Student's t with 3 degrees of freedom: a normal over the root of a chi-square."""
    generator = torch.Generator().manual_seed(12)
    squares = torch.randn(3, m, n, generator=generator).square().mean(dim=0)
    return torch.randn(m, n, generator=generator) / squares.sqrt()


SHAPES = [  # (out, in, rank): square, wide, tall, rank near min(shape), tiny
    (600, 600, 16),
    (600, 600, 64),
    (257, 1100, 8),
    (1100, 257, 8),
    (640, 640, 1),
    (640, 1000, 100),
    (300, 300, 45),
    (300, 301, 299),
    (64, 192, 64),
    (17, 33, 5),
    (1, 40, 1),
    (40, 1, 1),
    (1, 1, 1),
]


@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_truncated_svd_leaves_at_most_a_thousandth_more(m: int, n: int, rank: int, make) -> None:
    M = make(m, n)
    U, S, Vh = truncated_svd(M, rank)
    assert (U.shape, S.shape, Vh.shape) == ((m, rank), (rank,), (rank, n))
    assert left_over(M, U, S, Vh) <= 1.001 * optimum(M, rank) + ROUNDING * float(M.norm())


SPECTRA = {
    "equal": torch.ones(400),
    "two levels, the upper one as wide as the rank": torch.cat([torch.full((24,), 2.0), torch.ones(376)]),
    "two levels, the upper one wider": torch.cat([torch.full((100,), 2.0), torch.ones(300)]),
    "power law": torch.arange(1, 401).float() ** -0.7,
    "slow power law": torch.arange(1, 401).float() ** -0.1,
    "steep": 0.8 ** torch.arange(400).float(),
    "three spikes": torch.cat([torch.tensor([1e4, 1e3, 1e3]), torch.linspace(1, 0.5, 397)]),
    "of rank 10": torch.cat([torch.ones(10), torch.zeros(390)]),
    "of rank 30": torch.cat([torch.ones(30), torch.zeros(370)]),
}


@pytest.mark.parametrize("name", list(SPECTRA))
@pytest.mark.parametrize(("m", "n"), [(400, 400), (400, 700), (700, 400)])
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e15])
def test_truncated_svd_on_named_spectra(name: str, m: int, n: int, scale: float) -> None:
    M = with_spectrum(m, n, SPECTRA[name]) * scale
    rank = 24
    U, S, Vh = truncated_svd(M, rank)
    assert left_over(M, U, S, Vh) <= 1.001 * optimum(M, rank) + ROUNDING * float(M.double().norm())
    assert (S[:-1] >= S[1:]).all()
    assert (S >= 0).all()
    top = SPECTRA[name][0] * scale
    # A Ritz value is never above the singular value it stands for.
    exact = SPECTRA[name][:rank] * scale
    assert (exact + 2e-6 * top >= S).all()
    known = 1e-3 * top < S
    identity = torch.eye(int(known.sum()))
    torch.testing.assert_close(U[:, known].T @ U[:, known], identity, rtol=0, atol=2e-4)
    torch.testing.assert_close(Vh[known] @ Vh[known].T, identity, rtol=0, atol=2e-4)


def test_truncated_svd_finds_clear_triplets_to_float32() -> None:
    M = with_spectrum(500, 400, torch.cat([torch.tensor([9.0, 7.0, 5.0, 3.0]), torch.full((396,), 0.1)]))
    U, S, Vh = truncated_svd(M, 4)
    torch.testing.assert_close(S, torch.tensor([9.0, 7.0, 5.0, 3.0]), rtol=1e-5, atol=0)
    torch.testing.assert_close((M @ Vh.T) / S, U, rtol=0, atol=1e-5)
    torch.testing.assert_close((M.T @ U) / S, Vh.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(400, 400), (300, 700), (700, 300), (5, 3)])
def test_truncated_svd_of_zeros(shape: tuple[int, int]) -> None:
    U, S, Vh = truncated_svd(torch.zeros(shape), 3)
    assert torch.equal(S, torch.zeros(3))
    assert torch.isfinite(U).all()
    assert torch.isfinite(Vh).all()


def test_truncated_svd_with_dead_rows_and_columns() -> None:
    M = gaussian(600, 500)
    M[100:400] = 0
    M[:, ::2] = 0
    U, S, Vh = truncated_svd(M, 16)
    assert left_over(M, U, S, Vh) <= 1.001 * optimum(M, 16)
    assert float(U[100:400].abs().max()) == 0
    assert float(Vh[:, ::2].abs().max()) <= 1e-3


@pytest.mark.parametrize("method", ["fast", "exact"])
def test_truncated_svd_is_deterministic(method: str) -> None:
    M = gaussian(400, 300)
    torch.manual_seed(1)
    first = truncated_svd(M, 8, method=method, seed=3)
    torch.manual_seed(2)
    again = truncated_svd(M, 8, method=method, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_truncated_svd_seed_changes_the_sketch_only() -> None:
    M = gaussian(600, 600)
    one, other = (truncated_svd(M, 16, seed=seed) for seed in (1, 2))
    assert not torch.equal(one[1], other[1])
    torch.testing.assert_close(one[1], other[1], rtol=0.02, atol=0)


def test_truncated_svd_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    truncated_svd(gaussian(400, 300), 8)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(("m", "n"), [(600, 600), (400, 900), (900, 400)])
def test_truncated_svd_warm_start_needs_one_application(m: int, n: int) -> None:
    M = gaussian(m, n)
    _, _, Vh = truncated_svd(M, 32, method="exact")
    nearby = M + 0.05 * heavy_tailed(m, n)
    warm = left_over(nearby, *truncated_svd(nearby, 32, start=Vh.mT))
    cold = left_over(nearby, *truncated_svd(nearby, 32, applications=1))
    best = optimum(nearby, 32)
    assert warm <= 1.001 * best
    assert cold > 1.005 * best  # so that the start, not luck, is what made the difference


@pytest.mark.parametrize("rank", [8, 32, 50, 100, 150])
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_truncated_svd_warm_start_in_loftqs_alternation(make, rank: int) -> None:
    """Two steps of the loop the warm start is made for, with rounding to a grid for the quantiser."""
    W = make(600, 600)
    grid = float(W.std()) / 2
    M = W - (W / grid).round() * grid
    U, S, Vh = truncated_svd(M, rank)
    M = W - ((W - (U * S) @ Vh) / grid).round() * grid
    warm = left_over(M, *truncated_svd(M, rank, start=Vh.mT))
    assert warm <= 1.001 * optimum(M, rank)


@pytest.mark.parametrize("columns", [1, 3, 500])
def test_truncated_svd_start_of_any_width(columns: int) -> None:
    M = gaussian(600, 500)
    start = torch.randn(500, columns)
    U, S, Vh = truncated_svd(M, 8, start=start, applications=6)
    assert left_over(M, U, S, Vh) <= 1.001 * optimum(M, 8)


def test_truncated_svd_survives_a_useless_start() -> None:
    M = gaussian(600, 500)
    for start in (torch.zeros(500, 8), torch.ones(500, 8)):
        U, S, Vh = truncated_svd(M, 8, start=start, applications=6)
        assert left_over(M, U, S, Vh) <= 1.001 * optimum(M, 8)
        torch.testing.assert_close(Vh @ Vh.T, torch.eye(8), rtol=0, atol=1e-5)


def test_truncated_svd_more_applications_leave_less() -> None:
    M = gaussian(700, 700)
    left = [left_over(M, *truncated_svd(M, 16, applications=k)) for k in (0, 1, 3, 6)]
    assert left == sorted(left, reverse=True)
    assert left[0] > left[-1]


def test_truncated_svd_in_batches_equals_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("the exact way"))
    M = torch.stack([with_spectrum(420, 360, 0.9 ** torch.arange(360).float() * s) for s in (1.0, 3.0)])
    U, S, Vh = truncated_svd(M, 12)
    assert (U.shape, S.shape, Vh.shape) == ((2, 420, 12), (2, 12), (2, 12, 360))
    for i in range(2):
        u, s, vh = truncated_svd(M[i], 12)
        torch.testing.assert_close(S[i], s, rtol=1e-5, atol=0)
        product = (U[i] * S[i]) @ Vh[i]
        torch.testing.assert_close(product, (u * s) @ vh, rtol=0, atol=2e-5 * float(S[i, 0]))
    warm = truncated_svd(M, 12, start=Vh.mT)
    torch.testing.assert_close(warm[1], S, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_truncated_svd_computes_in_float32(dtype: torch.dtype) -> None:
    M = gaussian(400, 300).to(dtype)
    got = truncated_svd(M, 8)
    assert all(t.dtype == torch.float32 for t in got)
    assert all(torch.equal(a, b) for a, b in zip(got, truncated_svd(M.float(), 8)))


def test_truncated_svd_does_not_change_its_input() -> None:
    M = gaussian(400, 300)
    copy = M.clone()
    truncated_svd(M, 8, start=torch.randn(300, 8))
    assert torch.equal(M, copy)


@pytest.mark.parametrize("rank", [0, -1, 4])
def test_truncated_svd_rank_out_of_range(rank: int) -> None:
    with pytest.raises(InputError, match=rf"rank {rank} is not in \[1, 3\] for a weight of shape \(5, 3\)"):
        truncated_svd(torch.zeros(5, 3), rank)


def test_truncated_svd_bad_arguments() -> None:
    M = torch.zeros(5, 3)
    with pytest.raises(ValueError, match="unknown SVD method 'quick'; known methods: fast, exact"):
        truncated_svd(M, 2, method="quick")
    with pytest.raises(ValueError, match="applications is -1"):
        truncated_svd(M, 2, applications=-1)
    with pytest.raises(ValueError, match=r"start \(5, 2\) does not fit M \(5, 3\)"):
        truncated_svd(M, 2, start=torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"start \(3, 3, 2\) does not fit M \(2, 5, 3\)"):
        truncated_svd(torch.zeros(2, 5, 3), 2, start=torch.zeros(3, 3, 2))


def test_check_rank_names_the_weight() -> None:
    with pytest.raises(InputError, match=r"layers\.0\.q_proj: rank 9 is not in"):
        check_rank(9, (8, 16), "layers.0.q_proj")
    check_rank(8, (8, 16))


def test_from_svd_splits_the_root_evenly() -> None:
    M = gaussian(40, 30)
    U, S, Vh = truncated_svd(M, 30, method="exact")
    factors = LowRankFactors.from_svd(U, S, Vh)
    assert factors.rank == 30
    torch.testing.assert_close(factors.product(), M, rtol=0, atol=1e-5)
    torch.testing.assert_close(factors.A.norm(dim=1), factors.B.norm(dim=0), rtol=1e-5, atol=0)


def test_from_svd_keeps_idle_components_trainable() -> None:
    M = with_spectrum(50, 40, torch.tensor([2.0, 1.0]))
    factors = LowRankFactors.from_svd(*truncated_svd(M, 5))
    torch.testing.assert_close(factors.product(), M, rtol=0, atol=1e-5)
    assert float(factors.B[:, 2:].abs().max()) == 0
    lengths = factors.A[2:].norm(dim=1)  # of mean 1, so that B's gradient is not zero
    assert ((lengths > 0.3) & (lengths < 2)).all()


def test_from_svd_of_a_batch_is_that_of_each() -> None:
    U, Vh = torch.randn(3, 6, 4), torch.randn(3, 4, 5)
    S = torch.tensor([[3.0, 2.0, 1.0, 0.5], [3.0, 2.0, 0.0, 0.0], [0.0] * 4])
    both = LowRankFactors.from_svd(U, S, Vh)
    for i in range(3):
        alone = LowRankFactors.from_svd(U[i], S[i], Vh[i])
        assert torch.equal(both.A[i], alone.A)
        assert torch.equal(both.B[i], alone.B)


def test_columns_of_zeros_do_not_disturb_the_others() -> None:
    X = gaussian(50, 6)
    X[:, 2] = 0
    Q = _orthogonalised(X)
    assert float(Q[:, 2].abs().max()) == 0
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(Q[:, others].T @ Q[:, others], torch.eye(5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_block_that_adds_nothing_is_drawn_anew(batch: tuple[int, ...]) -> None:
    K = torch.linalg.qr(gaussian(60, 8))[0].expand(*batch, 60, 8)
    for block in (torch.zeros(*batch, 60, 5), K[..., :5] @ gaussian(5, 5)):
        new = _extension(K, block, torch.Generator().manual_seed(0))
        whole = torch.cat([K, new], dim=-1)
        identity = torch.eye(13).expand(*batch, 13, 13)
        torch.testing.assert_close(whole.mT @ whole, identity, rtol=0, atol=1e-6)


def test_divided_divides_the_product() -> None:
    factors = LowRankFactors(torch.randn(3, 7), torch.randn(5, 3))
    torch.testing.assert_close(4.0 * factors.divided(4.0).product(), factors.product())
    torch.testing.assert_close(factors.divided(4.0).A, factors.A / 2)


def test_factors_that_do_not_multiply() -> None:
    with pytest.raises(ValueError, match=r"A \(3, 7\) and B \(5, 2\) do not multiply"):
        LowRankFactors(torch.zeros(3, 7), torch.zeros(5, 2))
