"""The registry of initialisations, and what ``initialise`` stores and reports, for every method alike."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_engine import inits
from qlora_engine.errors import InputError
from qlora_engine.inits import Initialised, InitRequest, fold, initialise
from quant import QuantizedTensor, QuantSpec, quantize

NF4 = QuantSpec("nf4")
METHODS = inits.names()
DENSE = [name for name in METHODS if not inits.get(name).quantizes]
CALIBRATED = [name for name in METHODS if inits.get(name).needs_hessian]
CORRECTING = [name for name in METHODS if inits.get(name).corrects]


def weight_of(out_features: int = 96, in_features: int = 128, seed: int = 0) -> Tensor:
    """Gaussian with an outlier column and a heavy row."""
    W = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.02
    W[:, 3 % in_features] *= 6
    W[out_features // 2] *= 4
    return W


def second_moment(in_features: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    X = torch.randn(600, in_features, generator=generator) * torch.logspace(0, -1.5, in_features)
    return X.T @ X / 600


def run(W: Tensor, method: str, **options) -> Initialised:
    chosen = inits.get(method)
    if chosen.needs_hessian:
        options.setdefault("hessian", second_moment(W.shape[1]))
    if chosen.quantizes:
        options.setdefault("spec", NF4)
    return initialise(W, method=method, rank=options.pop("rank", 8), **options)


def effective(W: Tensor, done: Initialised) -> Tensor:
    """The weight that a layer with this base and adapter has, in float64."""
    base = W if done.base is None else done.base
    if isinstance(base, QuantizedTensor):
        base = base.dequantize(torch.float32)
    return base.double() + done.scaling * done.B.double() @ done.A.double()


def error(W: Tensor, done: Initialised) -> float:
    norm = float(W.double().norm())
    return float((W.double() - effective(W, done)).norm()) / norm if norm else 0.0


def test_names_lists_the_methods() -> None:
    expected = {"default", "gaussian", "random", "orthogonal", "pissa", "olora", "eva", "qlora", "loftq"}
    assert expected | {"qpissa"} <= set(METHODS)
    assert sorted(METHODS) == METHODS
    assert all(inits.get(name).name == name and inits.get(name).source for name in METHODS)


@pytest.mark.parametrize("name", ["nope", "LoftQ", "pissa_niter_", "pissa_niter_x", "pissa_4", ""])
def test_get_refuses_unknown_names(name: str) -> None:
    with pytest.raises(InputError, match="unknown initialisation"):
        inits.get(name)


def test_get_parses_pissa_niter() -> None:
    assert inits.get("pissa_niter_16").name == "pissa_niter_16"


@pytest.mark.parametrize("method", [*METHODS, "pissa_niter_4"])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_initialise_reports_the_error_of_what_is_stored(
    method: str, factor_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    W = weight_of().to(weight_dtype)
    done = run(W, method, factor_dtype=factor_dtype, scaling=1.7)
    assert (done.A.shape, done.B.shape) == ((8, 128), (96, 8))
    assert (done.A.dtype, done.B.dtype) == (factor_dtype, factor_dtype)
    assert done.A.is_contiguous()
    assert done.B.is_contiguous()
    assert done.error == pytest.approx(error(W, done), rel=1e-4, abs=1e-7)
    assert done.seconds > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [NF4, QuantSpec("nf2", 32, double_quant=True)])
def test_initialise_with_a_spec_stores_a_quantised_base(method: str, spec: QuantSpec) -> None:
    W = weight_of().half()
    done = run(W, method, spec=spec)
    assert isinstance(done.base, QuantizedTensor)
    assert (done.base.spec, done.base.dtype, done.base.shape) == (spec, torch.float16, W.shape)
    plain = quantize(W, spec).dequantize(torch.float32)
    assert done.error_plain == pytest.approx(float((W.float() - plain).norm() / W.float().norm()), rel=1e-5)


@pytest.mark.parametrize("method", [m for m in CORRECTING if inits.get(m).quantizes])
@pytest.mark.parametrize("format_name", ["nf4", "nf3", "nf2", "int4", "uint2", "int8", "fp4"])
@pytest.mark.parametrize("scales", ["absmax", "mse", "signed-mse"])
def test_initialise_is_better_than_plain(method: str, format_name: str, scales: str) -> None:
    done = run(weight_of(), method, spec=QuantSpec(format_name), scales=scales)
    assert done.error_plain is not None
    if not inits.get(method).needs_hessian:
        assert done.error < 0.97 * done.error_plain
    else:
        assert done.output_error is not None
        assert done.output_error_plain is not None
        assert done.output_error < 0.97 * done.output_error_plain


@pytest.mark.parametrize("method", DENSE)
def test_initialise_dense(method: str) -> None:
    W = weight_of().bfloat16()
    done = run(W, method, scaling=2.0)
    assert done.error_plain is None
    if inits.get(method).corrects:
        assert isinstance(done.base, Tensor)
        assert done.base.dtype == torch.bfloat16
        assert done.base.norm() < W.norm()
        assert done.error < 2**-8  # the rounding of the residual to bfloat16, nothing else
    else:
        assert done.base is None


@pytest.mark.parametrize("method", ["default", "gaussian", "eva", "qlora"])
def test_starts_with_nil_b_leave_the_layer_alone(method: str) -> None:
    one, other = (run(weight_of(), method, scaling=s) for s in (1.0, 4.0))
    assert not one.B.any()
    assert one.A.any()
    assert torch.equal(one.A, other.A)  # a start is not divided by the scaling


def test_initialise_of_the_residual_is_exact_whatever_the_factors_dtype() -> None:
    W = weight_of()
    for method in ("pissa", "olora"):
        done = run(W, method, factor_dtype=torch.bfloat16, scaling=0.5)
        assert done.error < 1e-6


# lora_alpha, use_rslora for rank 16: scaling 1/2, 1, 2, 4 and, rank-stabilised, 4 and 8
SCALINGS = {
    "alpha = r/2": 8 / 16,
    "alpha = r": 16 / 16,
    "alpha = 2r": 32 / 16,
    "alpha = 4r": 64 / 16,
    "rslora, alpha = r": 16 / math.sqrt(16),
    "rslora, alpha = 2r": 32 / math.sqrt(16),
    "alpha_pattern of 3": 3 / 16,
}


@pytest.mark.parametrize("method", CORRECTING)
@pytest.mark.parametrize("scaling", list(SCALINGS.values()), ids=list(SCALINGS))
def test_scaling_does_not_change_the_effective_weight(method: str, scaling: float) -> None:
    W = weight_of()
    one, scaled = run(W, method, rank=16, spec=NF4), run(W, method, rank=16, spec=NF4, scaling=scaling)
    assert scaled.error == pytest.approx(one.error, rel=1e-6)
    torch.testing.assert_close(effective(W, scaled), effective(W, one), rtol=0, atol=1e-7)
    torch.testing.assert_close(scaled.A * math.sqrt(scaling), one.A)


def test_an_ignored_scaling_would_lose_the_gain() -> None:
    """What the test above guards against: at scaling 2 the undivided factors undo their own correction."""
    W = weight_of()
    done = run(W, "loftq", iters=1)
    assert isinstance(done.base, QuantizedTensor)
    wrong = done.base.dequantize() + 2 * done.B @ done.A
    assert float((W - wrong).norm() / W.norm()) == pytest.approx(done.error_plain, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_initialise_is_deterministic(method: str) -> None:
    torch.manual_seed(1)
    one = run(weight_of(), method, seed=5)
    torch.manual_seed(2)
    other = run(weight_of(), method, seed=5)
    assert torch.equal(one.A, other.A)
    assert torch.equal(one.B, other.B)
    assert (one.error, one.trace) == (other.error, other.trace)


@pytest.mark.parametrize("method", ["default", "gaussian", "random", "orthogonal", "qlora"])
def test_seed_and_name_choose_the_random_numbers(method: str) -> None:
    W = weight_of()
    first = run(W, method).A
    assert not torch.equal(first, run(W, method, seed=1).A)
    assert not torch.equal(first, run(W, method, name="layers.0.q_proj").A)
    torch.manual_seed(0)
    assert torch.equal(first, run(W, method, seed=None).A)  # the global generator, in the same state
    assert not torch.equal(first, run(W, method, seed=None).A)


def test_default_has_the_range_of_a_linear_layer() -> None:
    A = run(weight_of(96, 400), "default", rank=64).A
    reference = torch.nn.Linear(400, 64).weight.detach()
    assert float(A.abs().max()) <= 1 / math.sqrt(400)
    assert float(A.std()) == pytest.approx(float(reference.std()), rel=0.03)


def test_gaussian_has_standard_deviation_one_over_rank() -> None:
    assert float(run(weight_of(96, 400), "gaussian", rank=64).A.std()) == pytest.approx(1 / 64, rel=0.03)


def test_random_is_not_an_identity() -> None:
    done = run(weight_of(), "random")
    assert done.B.any()
    assert done.error > 0.1
    assert float(done.B.abs().max()) <= 1 / math.sqrt(8)


def test_orthogonal_has_a_nil_product_of_full_factors() -> None:
    done = run(weight_of(), "orthogonal")
    assert done.A.any()
    assert done.B.any()
    assert float((done.B @ done.A).abs().max()) < 1e-6
    with pytest.raises(InputError, match="orthogonal initialisation needs an even rank, got 7"):
        run(weight_of(), "orthogonal", rank=7)


@pytest.mark.parametrize("shape", [(64, 64), (48, 80), (80, 48)])
def test_olora_is_the_leading_part_of_the_full_qr(shape: tuple[int, int]) -> None:
    W = weight_of(*shape)
    done = run(W, "olora", rank=12)
    Q, R = torch.linalg.qr(W)
    torch.testing.assert_close(done.B, Q[:, :12], rtol=0, atol=1e-5)
    torch.testing.assert_close(done.A, R[:12], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_16"])
def test_pissa_leaves_the_smallest_residual(method: str) -> None:
    W = weight_of(200, 180)
    done = run(W, method)
    best = torch.linalg.svdvals(W.double())[8:].norm()
    assert isinstance(done.base, Tensor)
    assert float(done.base.double().norm()) <= 1.001 * float(best)
    torch.testing.assert_close(done.A.norm(dim=1), done.B.norm(dim=0), rtol=1e-4, atol=0)


def test_pissa_niter_sets_the_effort() -> None:
    W = torch.randn(400, 400)
    left = {}
    for n in (0, 2, 8):
        base = run(W, f"pissa_niter_{n}").base
        assert isinstance(base, Tensor)
        left[n] = float(base.norm())
    assert left[0] > left[2] > left[8]


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    scale = torch.logspace(0, -2, 40)
    mixing = torch.linalg.qr(torch.randn(40, 40, generator=generator))[0]
    return (torch.randn(30, 50, 40, generator=generator) * scale) @ mixing + 0.3


@pytest.mark.parametrize("whiten", [False, True])
def test_eva_is_the_pca_of_the_inputs(whiten: bool) -> None:
    X = inputs()
    hessian, mean, tokens = inits.moments(X)
    assert tokens == 1500
    done = run(weight_of(16, 40), "eva", rank=6, hessian=hessian, mean=mean, tokens=tokens, whiten=whiten)
    flat = X.reshape(-1, 40).double()
    _, S, Vh = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)
    signs = torch.sign(Vh[:6].gather(1, Vh[:6].abs().argmax(dim=1, keepdim=True)))
    expected = Vh[:6] * signs / (S[:6].sqrt().unsqueeze(1) if whiten else 1)
    torch.testing.assert_close(done.A.double(), expected, rtol=0, atol=2e-4)
    assert not done.B.any()


def test_eva_errors() -> None:
    W, (hessian, mean, _) = weight_of(16, 40), inits.moments(inputs())
    with pytest.raises(InputError, match="needs the second moment"):
        initialise(W, method="eva", rank=2)
    with pytest.raises(InputError, match="3 inputs were seen, fewer than the rank 4"):
        run(W, "eva", rank=4, hessian=hessian, tokens=3)
    with pytest.raises(InputError, match="whitening needs the count of tokens"):
        run(W, "eva", rank=4, hessian=hessian, whiten=True)
    with pytest.raises(InputError, match=r"mean has shape \(3,\), expected \(40,\)"):
        run(W, "eva", rank=4, hessian=hessian, mean=mean[:3])


def test_output_errors_are_those_of_the_layer() -> None:
    W, X = weight_of(), torch.randn(500, 128) * torch.logspace(0, -1, 128)
    hessian, _, _ = inits.moments(X)
    done = run(W, "loftq", hessian=hessian)
    wanted, plain = X @ W.T, X @ quantize(W, NF4).dequantize().T
    got = X.double() @ effective(W, done).T
    assert done.output_error == pytest.approx(float((wanted - got).norm() / wanted.norm()), rel=1e-4)
    assert done.output_error_plain == pytest.approx(float((wanted - plain).norm() / wanted.norm()), rel=1e-4)
    without = run(W, "loftq")
    assert (without.output_error, without.output_error_plain) == (None, None)
    assert torch.equal(without.A, done.A)  # it measures, it doesn't steer LoftQ


def test_output_error_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(weight_of(), "loftq", hessian=second_moment())
    monkeypatch.setattr("qlora_engine.inits.fold._ROWS", 7)
    parts = run(weight_of(), "loftq", hessian=second_moment())
    assert parts.output_error == pytest.approx(whole.output_error, rel=1e-6)


SPECIAL = {
    "zero": torch.zeros(64, 128),
    "constant": torch.full((64, 128), 0.25),
    "dead rows": torch.cat([torch.zeros(32, 128), weight_of(32, 128)]),
    "dead columns": weight_of(64, 128) * (torch.arange(128) % 2),
    "one element": torch.tensor([[0.5]]),
    "one row": weight_of(1, 128),
    "one column": weight_of(128, 1),
    "of rank 1": torch.outer(torch.linspace(-1, 1, 64), torch.linspace(0, 2, 128)),
    "tiny values": weight_of(64, 128) * 1e-30,
    "huge values": weight_of(64, 128) * 1e18,
    "not a multiple of the block": weight_of(7, 33),
}


@pytest.mark.parametrize("name", list(SPECIAL))
@pytest.mark.parametrize("method", METHODS)
def test_initialise_of_special_weights(method: str, name: str) -> None:
    W = SPECIAL[name]
    rank = min(2, *W.shape)
    if method == "orthogonal" and rank < 2:
        pytest.skip("orthogonal needs an even rank")
    for spec in (NF4, QuantSpec("uint3", 16, double_quant=True)):
        done = run(W, method, spec=spec, rank=rank)
        assert torch.isfinite(done.A).all()
        assert torch.isfinite(done.B).all()
        assert (done.A.any(dim=1) | done.B.any(dim=0)).all()  # or that component could never learn
        assert done.error == pytest.approx(error(W, done), rel=1e-3, abs=1e-6)
        if inits.get(method).corrects and not inits.get(method).needs_hessian and inits.get(method).quantizes:
            assert done.error_plain is not None
            assert done.error <= done.error_plain


def test_initialise_of_zeros_reports_no_error() -> None:
    done = run(torch.zeros(64, 128), "loftq")
    assert (done.error, done.error_plain, done.best) == (0.0, 0.0, 0)
    assert not done.B.any()


def test_rank_up_to_the_smaller_side() -> None:
    W = weight_of(16, 128)
    full = run(W, "loftq", rank=16, iters=1)
    assert full.error < 1e-6  # rank 16 corrects everything
    with pytest.raises(
        InputError, match=r"a\.b: rank 17 is not in \[1, 16\] for a weight of shape \(16, 128\)"
    ):
        run(W, "loftq", rank=17, name="a.b")


def test_conv1d_is_the_transpose() -> None:
    """GPT-2's Conv1D holds (in, out); the transpose is solved and A, B come out as PEFT stores them."""
    conv_weight = weight_of(96, 128).T.contiguous()  # (in 128, out 96)
    done = run(conv_weight.T, "loftq")
    same = run(conv_weight.T.contiguous(), "loftq")
    assert (done.A.shape, done.B.shape) == ((8, 128), (96, 8))
    assert torch.equal(done.A, same.A)
    assert isinstance(done.base, QuantizedTensor)
    assert isinstance(same.base, QuantizedTensor)
    assert torch.equal(done.base.codes, same.base.codes)


def test_embedding_factors_have_pefts_layout() -> None:
    table = weight_of(300, 64)  # (num_embeddings, dim)
    done = run(table, "loftq", scaling=2.0, kind="embedding")
    lora_A, lora_B = inits.embedding_factors(done.A, done.B)
    assert (lora_A.shape, lora_B.shape) == ((8, 300), (64, 8))
    tokens = torch.tensor([0, 7, 299, 7])
    assert isinstance(done.base, QuantizedTensor)
    out = torch.nn.functional.embedding(tokens, done.base.dequantize())
    out = out + 2.0 * torch.nn.functional.embedding(tokens, lora_A.T) @ lora_B.T
    torch.testing.assert_close(out.double(), effective(table, done)[tokens], rtol=0, atol=1e-6)


def test_embedding_starts_like_pefts() -> None:
    table = weight_of(300, 200)
    for method in ("default", "gaussian"):
        lora_A, lora_B = inits.embedding_factors(*_factors(run(table, method, kind="embedding")))
        assert not lora_A.any()
        assert float(lora_B.std()) == pytest.approx(1, rel=0.1)
    lora_A, lora_B = inits.embedding_factors(*_factors(run(table, "random", kind="embedding")))
    assert float(lora_A.std()) == pytest.approx(1, rel=0.1)
    assert float(lora_B.std()) == pytest.approx(1, rel=0.1)


def _factors(done: Initialised) -> tuple[Tensor, Tensor]:
    return done.A, done.B


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["default", "pissa", "loftq"])
def test_non_finite_weights_are_refused_by_name(method: str, bad: float) -> None:
    W = weight_of()
    W[5, 7] = W[6, 8] = bad
    with pytest.raises(InputError, match=r"'layers\.0\.q' \(96, 128\) has 2 elements that are NaN or inf"):
        run(W, method, name="layers.0.q")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": 0.0}, "scaling 0.0 must be positive"),
        ({"scaling": -1.0}, "scaling -1.0 must be positive"),
        ({"scaling": math.inf}, "must be positive and finite"),
        ({"scaling": math.nan}, "must be positive and finite"),
        ({"iters": 0}, "iters=0; it must be an integer of at least 1"),
        ({"iters": 2.5}, "iters=2.5"),
        ({"scales": "max"}, "scales='max'; allowed: absmax, mse, signed-mse"),
        ({"svd": "quick"}, "svd='quick'; allowed: fast, exact"),
        ({"start": "one"}, "start='one'; allowed: zero, svd"),
        ({"kind": "conv"}, "kind='conv'; allowed: linear, embedding"),
        ({"damping": -0.1}, "damping=-0.1; it must not be negative"),
        ({"rank": 0}, r"rank 0 is not in \[1, 96\]"),
        ({"rank": 97}, r"rank 97 is not in \[1, 96\]"),
        ({"hessian": torch.eye(3)}, r"hessian has shape \(3, 3\), expected \(128, 128\)"),
        ({"spec": None}, "loftq quantises the base: it needs a spec"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(weight_of(), "loftq", **options)


def test_bad_weights() -> None:
    with pytest.raises(TypeError, match=r"weight is torch.int8; allowed: torch\.float32"):
        initialise(torch.zeros(4, 4, dtype=torch.int8), method="default", rank=1)
    with pytest.raises(TypeError, match=r"factor_dtype is torch.int8"):
        initialise(torch.zeros(4, 4), method="default", rank=1, factor_dtype=torch.int8)
    for shape in ((4,), (2, 3, 4), (0, 4)):
        with pytest.raises(InputError, match="expected \\(out_features, in_features\\)"):
            initialise(torch.zeros(shape), method="default", rank=1)
    with pytest.raises(TypeError, match="unexpected keyword"):
        initialise(torch.zeros(4, 4), method="default", rank=1, iterations=3)


def test_initialise_takes_a_method_itself_and_leaves_the_weight_alone() -> None:
    W = weight_of()
    copy = W.clone()
    parameter = torch.nn.Parameter(W)
    done = initialise(parameter, method=inits.get("pissa"), rank=4)
    assert torch.equal(W, copy)
    assert not done.A.requires_grad
    assert isinstance(done.base, Tensor)
    assert not done.base.requires_grad


def test_products_are_float32_whatever_the_process_allows() -> None:
    """bfloat16 on a CPU, as TF32 on a GPU, would change the factors."""
    setting: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(setting, "fp32_precision"):
        pytest.skip("this torch has no such setting")
    W = weight_of(400, 400)
    done = run(W, "loftq")
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "bf16"
        same = run(W, "loftq")
        assert setting.fp32_precision == "bf16"
    finally:
        setting.fp32_precision = before
    assert torch.equal(done.A, same.A)
    assert same.error == done.error


def test_float64_weights_are_solved_in_float32() -> None:
    W = weight_of()
    done, same = run(W.double(), "loftq"), run(W, "loftq")
    assert torch.equal(done.A, same.A)
    assert isinstance(done.base, QuantizedTensor)
    assert done.base.dtype == torch.float32


def test_rounding_that_costs_more_than_the_gain_falls_back_to_plain() -> None:
    """float16 flushes factors below 6e-8 to zero: LoftQ's base without its correction is worse than plain."""
    W = weight_of() * 1e-16
    done = run(W, "loftq", factor_dtype=torch.float16, spec=QuantSpec("nf2"))
    assert done.best == 0
    assert done.error == done.error_plain
    assert not done.B.any()
    assert isinstance(done.base, QuantizedTensor)
    assert torch.equal(done.base.codes, quantize(W, QuantSpec("nf2")).codes)


def test_request_is_what_methods_get() -> None:
    request = InitRequest(4, NF4, seed=None)
    assert request.generator() is None
    assert request.svd_seed == 0


def test_a_method_is_judged_by_what_it_minimises() -> None:
    error = fold._Error(weight=1.0, output=2.0)
    assert error.in_terms_of(inits.get("qera")) == 2.0
    assert error.in_terms_of(inits.get("loftq")) == 1.0
    assert fold._Error(weight=1.0, output=None).in_terms_of(inits.get("qera")) == 1.0
