"""The calibrated initialisations: J never rises, degenerate layers break nothing, what is stored counts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from qlora_engine import inits
from qlora_engine.errors import InputError
from qlora_engine.inits import Initialised, initialise, recipe
from qlora_engine.inits.method import InitRequest
from quant import QuantizedTensor, QuantSpec

CALIBRATED = ["qera", "qera-diag", "qera-alternating", "cloq", "recipe-fast", "recipe"]
RECIPES = ["recipe-fast", "recipe"]


def weight_of(out_features: int = 96, in_features: int = 128, seed: int = 0) -> Tensor:
    W = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.02
    W[:, 3 % in_features] *= 6
    return W


def second_moment(n: int = 128, tokens: int = 600, seed: int = 9) -> Tensor:
    """Correlated inputs with a falling spectrum."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    X = torch.randn(tokens, n, generator=generator) * torch.logspace(0, -1.5, n) @ mix
    return X.T @ X / tokens


def run(method: str, W: Tensor, spec: QuantSpec | None = None, **options: object) -> Initialised:
    options.setdefault("hessian", second_moment(W.shape[1]))
    return initialise(
        W,
        method=method,
        rank=options.pop("rank", 8),  # type: ignore[arg-type]
        spec=spec or QuantSpec("nf3"),
        **options,
    )


def output_error(W: Tensor, done: Initialised, hessian: Tensor) -> float:
    assert isinstance(done.base, QuantizedTensor)
    E = W.double() - done.base.dequantize(torch.float32).double()
    E -= done.scaling * done.B.double() @ done.A.double()
    H = hessian.double()
    return math.sqrt(float(torch.trace(E @ H @ E.T) / torch.trace(W.double() @ H @ W.double().T)))


def test_the_calibrated_methods_are_registered() -> None:
    for name in CALIBRATED:
        method = inits.get(name)
        assert (method.needs_hessian, method.quantizes, method.corrects) == (True, True, True)


@pytest.mark.parametrize("svd", ["fast", "exact"])
@pytest.mark.parametrize(
    "spec", [QuantSpec("nf4"), QuantSpec("nf2", 32), QuantSpec("uint3"), QuantSpec("fp4")]
)
def test_j_never_rises_after_the_first_closed_form(spec: QuantSpec, svd: str) -> None:
    done = run("recipe", weight_of(), spec, iters=6, svd=svd)
    rounds = done.trace[1:]
    assert len(rounds) >= 3
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(rounds))
    assert rounds[0] < 0.8 * done.trace[0]
    assert done.trace[done.best] == min(done.trace)


@pytest.mark.parametrize("schedule", [{"sweeps": 0}, {"again": False}, {"warm": 0}, {"warm": 3, "sweeps": 2}])
def test_j_never_rises_under_any_schedule(schedule: dict[str, int]) -> None:
    request = InitRequest(8, QuantSpec("nf2"), hessian=second_moment())
    rounds = recipe.run(weight_of(), request, recipe.Schedule(4, **schedule)).trace[1:]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(rounds))
    assert rounds[-1] < rounds[0]


def test_methods_improve_in_the_order_of_their_cost() -> None:
    W = weight_of()
    for bits in (4, 3, 2):
        spec = QuantSpec(f"nf{bits}")
        errors = {name: run(name, W, spec).output_error for name in [*CALIBRATED, "loftq", "qlora"]}
        assert errors["qera"] < errors["loftq"] < errors["qlora"], bits
        assert errors["qera"] < errors["qera-diag"] < errors["qlora"], bits
        assert errors["recipe"] < errors["recipe-fast"] < errors["cloq"] < errors["qera"], bits


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_with_the_identity_the_recipe_is_not_worse_than_loftq_with_scale_search(bits: int) -> None:
    W, spec = weight_of(), QuantSpec(f"nf{bits}")
    calibrated = run("recipe", W, spec, hessian=torch.eye(128), iters=5)
    plain = initialise(W, method="loftq", rank=8, spec=spec, scales="signed-mse", iters=5)
    assert calibrated.error <= plain.error * 1.001


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(96, 128), (40, 72)])
def test_the_objective_is_that_of_what_is_stored(
    method: str, double_quant: bool, shape: tuple[int, int]
) -> None:
    W, H = weight_of(*shape), second_moment(shape[1])
    done = run(method, W, QuantSpec("nf3", 64, double_quant), hessian=H, scaling=2.0)
    assert done.output_error == pytest.approx(output_error(W, done, H), rel=1e-4)
    if method != "qera-diag":  # whose own objective is another
        damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H))
        assert done.trace[done.best] == pytest.approx(output_error(W, done, damped), rel=1e-3)


@pytest.mark.parametrize("method", RECIPES)
def test_double_quantised_scales_cost_little(method: str) -> None:
    W = weight_of()
    plain = run(method, W, QuantSpec("nf4")).output_error
    nested = run(method, W, QuantSpec("nf4", double_quant=True)).output_error
    assert plain is not None
    assert nested is not None
    assert nested < 1.05 * plain


@pytest.mark.parametrize("method", RECIPES)
def test_mse_declines_negative_scales(method: str) -> None:
    def negative(scales: str) -> bool:
        base = run(method, weight_of(), scales=scales).base
        assert isinstance(base, QuantizedTensor)
        return bool((base.dense_scales() < 0).any())

    assert not negative("mse")
    assert negative("absmax")
    assert negative("signed-mse")


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("name", ["nf4", "uint2", "int3", "fp4"])
def test_degenerate_layers(method: str, name: str) -> None:
    """Dead inputs, zero and constant rows, a moment of few tokens: finite, and no worse than plain."""
    W = weight_of()
    W[0] = 0
    W[1] = 0.5
    H = second_moment(tokens=5)
    H[[0, 7]] = 0
    H[:, [0, 7]] = 0
    done = run(method, W, QuantSpec(name), hessian=H)
    assert torch.isfinite(done.A).all()
    assert torch.isfinite(done.B).all()
    assert done.output_error is not None
    assert done.output_error_plain is not None
    assert done.output_error <= done.output_error_plain


@pytest.mark.parametrize("method", CALIBRATED)
def test_zero_weight_and_zero_moment(method: str) -> None:
    nothing = run(method, torch.zeros(32, 64))
    assert nothing.error == 0
    assert bool((nothing.A.norm(dim=1) > 0).all())  # can still be trained
    blind = run(method, weight_of(32, 64), hessian=torch.zeros(64, 64))  # taken for the identity
    assert blind.error < 0.97 * (blind.error_plain or 0)


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize(("shape", "rank"), [((8, 64), 8), ((64, 8), 8), ((1, 64), 1), ((64, 1), 1)])
def test_narrow_layers(method: str, shape: tuple[int, int], rank: int) -> None:
    """Rank as large as the layer allows: the correction is all that quantisation lost."""
    done = run(method, weight_of(*shape), rank=rank)
    assert done.error < 1e-3


@pytest.mark.parametrize("method", CALIBRATED)
def test_fewer_inputs_than_the_rank_is_an_error(method: str) -> None:
    with pytest.raises(InputError, match="rank 16 is not in"):
        run(method, weight_of(64, 8), rank=16)


@pytest.mark.parametrize("method", [m for m in CALIBRATED if inits.get(m).diagonal_hessian])
def test_a_diagonal_will_do(method: str) -> None:
    W, H = weight_of(), second_moment()
    done = run(method, W, hessian=H.diagonal())
    same = run("qera-diag", W, hessian=H)
    if method in ("qera", "qera-diag"):
        torch.testing.assert_close(done.B @ done.A, same.B @ same.A, rtol=1e-3, atol=1e-6)
    assert done.output_error is not None
    assert done.output_error_plain is not None
    assert done.output_error < 0.97 * done.output_error_plain


def test_cloq_needs_the_whole_moment() -> None:
    with pytest.raises(InputError, match="cloq needs the whole second moment"):
        run("cloq", weight_of(), hessian=torch.ones(128))


@pytest.mark.parametrize("method", CALIBRATED)
def test_same_seed_same_result(method: str) -> None:
    first, second = (run(method, weight_of(), seed=4) for _ in range(2))
    assert isinstance(first.base, QuantizedTensor)
    assert isinstance(second.base, QuantizedTensor)
    assert torch.equal(first.base.codes, second.base.codes)
    assert torch.equal(first.A, second.A)


def test_factors_are_balanced() -> None:
    done = run("recipe-fast", weight_of())
    torch.testing.assert_close(done.A.norm(dim=1), done.B.norm(dim=0), rtol=1e-4, atol=0)
