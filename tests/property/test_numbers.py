"""Numbers at the edges: right, or refused with a clear message; over every format and every method."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import qlora_engine as qe
from qlora_engine import inits
from qlora_engine.errors import InputError
from qlora_engine.inits import initialise
from quant import QuantSpec, formats, quantize
from quant.backends import reference
from quant.tensor import SCALE_RULES

FLOAT32_MAX = torch.finfo(torch.float32).max
TINIEST = 2.0**-149  # the smallest denormal of float32


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks_of_all_sizes() -> Tensor:
    return torch.cat([gaussian(4, 64) * 10.0**power for power in (-30, -10, 0, 10, 30)])


WEIGHTS = {
    "zeros": torch.zeros(8, 64),
    "zero rows": gaussian(8, 64) * torch.tensor([1.0, 0, 1, 0, 0, 1, 0, 1])[:, None],
    "denormals": gaussian(8, 64) * 1e-40,
    "the smallest denormal": (gaussian(8, 64) > 0).float() * TINIEST,
    "tiny": gaussian(8, 64) * 1e-30,
    "huge": gaussian(8, 64) * 1e30,
    "near the largest": gaussian(8, 64).clamp(-1, 1) * FLOAT32_MAX,
    "all sizes": blocks_of_all_sizes(),
    "one outlier": gaussian(8, 64).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(1e30)),
    "constant": torch.full((8, 64), 0.1),
    "ragged": gaussian(7, 37) * 1e-3,
    "float16's largest": (gaussian(8, 64).clamp(-1, 1) * 65504).half(),
    "bfloat16's largest": (gaussian(8, 64).clamp(-1, 1) * 3.3e38).bfloat16(),
    "float16's denormals": (gaussian(8, 64) * 1e-7).half(),
}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("name", formats.names())
def test_formats(name: str, rule: str, double_quant: bool) -> None:
    """Every value is finite and within half the widest gap of levels, in units of its block's largest."""
    spec = QuantSpec(name, 32, double_quant)
    levels = sorted(spec.fmt.levels)
    gap = max(b - a for a, b in itertools.pairwise(levels)) / max(map(abs, levels))
    for case, weight in WEIGHTS.items():
        if case in TOO_LARGE:
            with pytest.raises(
                ValueError, match=r"has values up to 3\.\d+e\+38: too near to float32's largest"
            ):
                quantize(weight, spec, scales=rule)
            continue
        try:
            q = quantize(weight, spec, scales=rule)
        except ValueError as error:
            if case != "float16's largest" or "beyond float16's 65504" not in str(error):
                raise
            continue
        back = q.dequantize(torch.float32)
        assert torch.isfinite(back).all(), case
        assert torch.isfinite(q.dequantize()).all(), case
        if double_quant or rule != "absmax" or spec.fmt.affine:
            continue
        wide = weight.double().reshape(-1)
        padded = torch.cat([wide, wide.new_zeros(-wide.numel() % 32)]).view(-1, 32)
        largest = padded.abs().amax(1, keepdim=True).expand_as(padded).reshape(-1)[: wide.numel()]
        allowed = largest * (
            gap / 2 + (1 - min(abs(levels[0]), abs(levels[-1])) / max(map(abs, levels))) + 1e-3
        )
        # blocks whose scale is a denormal are taken for zero
        slack = reference.TINY * max(map(abs, levels))
        assert ((back.double().reshape(-1) - wide).abs() <= allowed + slack).all(), case


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("name", formats.names())
def test_a_power_of_two_changes_nothing(name: str, rule: str) -> None:
    """Neither searches nor encoders over- or underflow where the weight itself does not."""
    weight, spec = gaussian(8, 64), QuantSpec(name, 32)
    one = quantize(weight, spec, scales=rule)
    for power in (-100, -60, 60, 110):
        other = quantize(weight * 2.0**power, spec, scales=rule)
        assert torch.equal(other.codes, one.codes), power
        assert torch.equal(other.scales, one.scales * 2.0**power), power


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", formats.names())
def test_not_finite_is_refused(name: str, dtype: torch.dtype, value: float) -> None:
    weight = gaussian(8, 64).to(dtype)
    weight[7, 63] = value
    for rule in SCALE_RULES:
        with pytest.raises(ValueError, match=r"'w' \(8, 64\) has 1 elements that are NaN or inf"):
            quantize(weight, QuantSpec(name, 32), scales=rule, name="w")


TOO_LARGE = ("near the largest", "bfloat16's largest")


def moments(width: int) -> dict[str, Tensor]:
    few = gaussian(3, width, seed=1)
    axes = torch.linalg.qr(gaussian(width, width, seed=2))[0]
    graded = axes * torch.logspace(0, -12, width) @ axes.T
    return {
        "identity": torch.eye(width),
        "zero": torch.zeros(width, width),
        "rank 3": few.T @ few / 3,
        "ill-conditioned": (graded + graded.T) / 2,
        "dead inputs": torch.diag((torch.arange(width) % 3 > 0).float()),
        "tiny": torch.eye(width) * 1e-30 + 1e-31,
        "huge": torch.eye(width) * 1e30 + 1e29,
        "all sizes": torch.diag(torch.logspace(-18, 18, width)),
        "slightly negative": torch.eye(width) - 1.0001 / width,
    }


def solve(weight: Tensor, method: str, **options: Any) -> inits.Initialised:
    spec = QuantSpec("nf4", 32)
    known = inits.get(method)
    if known.needs_hessian and "hessian" not in options:
        options["hessian"] = torch.eye(weight.shape[1])
    if method == "eva":
        options |= {"mean": torch.zeros(weight.shape[1]), "tokens": 1000}
    used = spec if known.quantizes or known.corrects else None
    return initialise(weight, method=method, rank=4, spec=used, **options)


def check(done: inits.Initialised, case: str) -> None:
    assert torch.isfinite(done.A).all(), case
    assert torch.isfinite(done.B).all(), case
    assert math.isfinite(done.error), case
    assert done.output_error is None or math.isfinite(done.output_error), case
    if done.base is not None:
        base = done.base if isinstance(done.base, Tensor) else done.base.dequantize(torch.float32)
        assert torch.isfinite(base).all(), case


@pytest.mark.parametrize("method", inits.names())
def test_methods_on_weights(method: str) -> None:
    """A finite answer, or one of our errors; a method that corrects never does worse than plain."""
    known = inits.get(method)
    for case, weight in WEIGHTS.items():
        squares = ("huge", "all sizes", "one outlier") if known.needs_hessian else ()
        if case in TOO_LARGE or case in squares:
            with pytest.raises(InputError, match=r"has a norm of .* can be solved in float32"):
                solve(weight, method)
            continue
        try:
            done = solve(weight, method)
        except InputError as error:
            if case != "float16's largest" or "beyond float16's 65504" not in str(error):
                raise
            continue
        check(done, case)
        if known.corrects and known.quantizes and done.error_plain is not None and not known.needs_hessian:
            assert done.error <= done.error_plain * (1 + 1e-6), case


@pytest.mark.parametrize("method", [name for name in inits.names() if inits.get(name).needs_hessian])
def test_methods_on_moments(method: str) -> None:
    weight = gaussian(24, 64)
    for case, H in moments(64).items():
        done = solve(weight, method, hessian=H)
        check(done, case)
        if inits.get(method).quantizes and done.output_error_plain is not None:
            assert done.output_error is not None
            assert done.output_error <= done.output_error_plain * (1 + 1e-5), case


@pytest.mark.parametrize("method", [name for name in inits.names() if inits.get(name).needs_hessian])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_broken_moment_is_refused(method: str, value: float) -> None:
    H = torch.eye(64)
    H[3, 3] = value
    with pytest.raises(ValueError, match=r"finite|negative"):
        solve(gaussian(24, 64), method, hessian=H)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("true_rank", [0, 1, 2])
def test_rank_deficient_weights(rank: int, true_rank: int) -> None:
    weight = gaussian(24, true_rank) @ gaussian(true_rank, 64, seed=1)
    for method in inits.names():
        check(solve(weight, method), method)


# ---- merging


def adapted(value: float, dtype: torch.dtype, init: str = "dense") -> Any:
    """A Linear whose adapter adds ``value`` to its first weight."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).to(dtype)
    config = qe.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    model = qe.get_peft_model(model, config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.zero_()
        layer.lora_B["default"].weight.zero_()
        layer.lora_A["default"].weight[0, 0] = 256.0
        layer.lora_B["default"].weight[0, 0] = value / 256.0
    return model


@pytest.mark.parametrize("value", [70_000.0, -70_000.0, 65_600.0])
def test_merge_beyond_float16_is_refused(value: float) -> None:
    model = adapted(value, torch.float16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"beyond float16's 6.55e\+04; merge in bfloat16 or float32"):
        model.merge_and_unload()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_merge_within_float16_is_exact() -> None:
    model = adapted(65_000.0, torch.float16)
    weight = model.base_model.model[0].base_layer.weight.detach().clone()
    merged = model.merge_and_unload()[0].weight
    assert merged[0, 0] == (weight[0, 0].float() + 65_000.0).half()
    assert torch.equal(merged[1:], weight[1:])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_safe_merge_refuses_what_is_not_finite(value: float) -> None:
    model = adapted(value, torch.float32)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)
