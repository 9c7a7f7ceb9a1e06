"""The one place where a method's solution becomes what is stored: scaled, rounded and measured."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_engine.errors import InputError
from qlora_engine.hessian import ieee_float32
from qlora_engine.inits.method import InitRequest, Method, Solution, frobenius, relative
from qlora_engine.lowrank import LowRankFactors, check_rank
from quant import QuantizedTensor, QuantSpec, quantize
from quant.tensor import refuse_overflow

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Beyond these float32 holds no scales of a weight, or no squares of its outputs.
_LARGEST_NORM, _LARGEST_NORM_SQUARED = 1e35, 1e19
_ROWS = 1024  # of the error multiplied by the second moment at once


@dataclass(frozen=True, eq=False)
class Initialised:
    """A base and an adapter as they are stored, and how far they are from the weight.

    Attributes:
        base: Quantised; or the dense residual in the weight's dtype; or None: the base keeps the weight.
        A: (r, in_features) in ``factor_dtype``.
        B: (out_features, r) in ``factor_dtype``: weight ~= base + scaling * B @ A.
        method, rank, scaling: As asked for.
        error_plain: ||W - Q||_F / ||W||_F of plain absmax quantisation; None without a spec.
        error: The same of the stored base + scaling * B @ A.
        output_error_plain, output_error: sqrt(tr(E H E^T) / tr(W H W^T)), the relative error of the layer's
            output; None without a second moment H.
        trace: The method's objective by iteration, entry 0 for the plain base; before rounding the factors.
        best: Index into ``trace`` of what was kept; 0: plain quantisation with B = 0.
        seconds: Wall time of everything, measuring included.
    """

    base: QuantizedTensor | Tensor | None
    A: Tensor
    B: Tensor
    method: str
    rank: int
    scaling: float
    error_plain: float | None
    error: float
    output_error_plain: float | None
    output_error: float | None
    trace: tuple[float, ...]
    best: int
    seconds: float

    @property
    def iterations(self) -> int:
        """Alternations that were run, an early stop counted."""
        return max(len(self.trace) - 1, 0)


@torch.no_grad()
@ieee_float32()
def initialise(
    weight: Tensor,
    *,
    method: str | Method,
    rank: int,
    spec: QuantSpec | None = None,
    scaling: float = 1.0,
    factor_dtype: torch.dtype = torch.float32,
    hessian: Tensor | None = None,
    **options: Any,
) -> Initialised:
    """Quantise (with a spec) and initialise one adapter, so that weight ~= base + scaling * B @ A.

    Products are true float32, whatever (TF32, bfloat16) the process allows: a second moment spans six orders
    of magnitude, and the basis of an SVD would not be orthonormal.

    Args:
        weight: Dense (out_features, in_features), finite, float16, bfloat16, float32 or float64; computed in
            float32. The transpose of GPT-2's Conv1D weight; an embedding as it is, (num_embeddings, dim), see
            ``embedding_factors``; a convolution flattened to two dimensions.
        method: A name that ``inits.get`` understands, or a Method.
        rank: In [1, min(weight.shape)].
        spec: Format of the base. None: dense, which the quantising methods refuse.
        scaling: The layer's LoRA scaling, positive, however it came about: lora_alpha / r, or / sqrt(r) with
            rsLoRA, rank_pattern, alpha_pattern. A correction is divided by it, evenly in A and B; a start for
            training (default, gaussian, eva, ...) is not.
        factor_dtype: Of A and B as stored; the errors are those of the rounded factors.
        hessian: Second moment E[x x^T] of the layer's inputs, (in, in), or only its diagonal (in,), which
            measures as if inputs were uncorrelated. With it the output errors are reported, and the
            calibrated methods can run.
        **options: The other fields of InitRequest: iters, scales, svd, start, seed, damping, mean, tokens,
            whiten, kind, name.

    Raises:
        InputError: rank out of range, scaling not positive, NaN or inf or a norm near float32's limits in the
            weight, a missing spec or second moment, one of the wrong shape or with impossible values, a
            float16 result beyond its range, an unknown method, or what InitRequest refuses.
        TypeError: the weight is not floating point, or an unknown option.
    """
    began = time.perf_counter()
    chosen = _method(method)
    request = InitRequest(rank, spec, hessian=hessian, **options)
    W, norm = _checked(weight, chosen, request, scaling, factor_dtype)
    solution = chosen.solve(W, request)
    found = _measured(W, norm, weight.dtype, chosen, solution, request, scaling, factor_dtype)
    return dataclasses.replace(found, seconds=time.perf_counter() - began)


@torch.no_grad()
def initialise_many(
    weights: Sequence[Tensor],
    names: Sequence[str | None],
    *,
    method: str | Method,
    rank: int,
    spec: QuantSpec | None = None,
    scaling: float = 1.0,
    factor_dtype: torch.dtype = torch.float32,
    **options: Any,
) -> list[Initialised]:
    """``initialise`` for weights of one shape, at once where the method can (LoftQ), else one by one.

    Results equal those of ``initialise`` up to rounding; ``seconds`` is an equal share of all. For GPUs: a
    matrix of 1024 x 4096 is solved in hundreds of small launches, which take as long for ten of them.

    Args:
        weights: As for ``initialise``, all of one shape.
        names: One a weight, each a name or None.
        method: As for ``initialise``, like all that follow.
        rank: The same for all.
        spec: The same for all.
        scaling: The same for all.
        factor_dtype: The same for all.
        **options: Other fields of InitRequest, without hessian and mean.

    Raises:
        ValueError: weights of several shapes, or another number of names. InputError, TypeError: as
            ``initialise``.
    """
    began = time.perf_counter()
    chosen = _method(method)
    if len({weight.shape for weight in weights}) > 1 or len(names) != len(weights):
        raise ValueError(f"{len(weights)} weights of one shape with as many names; got {len(names)} names")
    requests = [InitRequest(rank, spec, **{**options, "name": name}) for name in names]
    checked = [
        _checked(weight, chosen, request, scaling, factor_dtype)
        for weight, request in zip(weights, requests, strict=True)
    ]
    # what many solve at once is squared in float32, with nobody to look for overflow
    usual = all(1e-10 < norm < 1e15 for _, norm in checked)
    if chosen.solve_many is not None and usual and len(weights) > 1:
        solutions = chosen.solve_many(torch.stack([W for W, _ in checked]), requests)
    else:
        solutions = [chosen.solve(W, request) for (W, _), request in zip(checked, requests, strict=True)]
    found = [
        _measured(W, norm, weight.dtype, chosen, solution, request, scaling, factor_dtype)
        for (W, norm), weight, solution, request in zip(checked, weights, solutions, requests, strict=True)
    ]
    share = (time.perf_counter() - began) / max(len(weights), 1)
    return [dataclasses.replace(each, seconds=share) for each in found]


def _measured(
    W: Tensor,
    norm: float,
    dtype: torch.dtype,
    chosen: Method,
    solution: Solution,
    request: InitRequest,
    scaling: float,
    factor_dtype: torch.dtype,
) -> Initialised:
    """What is stored of a solution, and its errors; ``seconds`` is left for the caller."""
    spec, hessian = request.spec, request.hessian
    base, factors = _stored(W, dtype, chosen, solution, request, scaling, factor_dtype)
    left = _left(W, W if base is None else base, factors, scaling)
    best, error = solution.best, _measure(left, W, norm, hessian)
    plain = None
    if spec is not None:
        if solution.error_plain is not None and hessian is None:
            plain = _Error(solution.error_plain, None)
        else:
            plain = _measure(_left(W, quantize(W, spec), None, scaling), W, norm, hessian)
        if chosen.corrects and chosen.quantizes and error.in_terms_of(chosen) > plain.in_terms_of(chosen):
            # Rounding the factors has cost more than they gain: keep nothing but A, to train.
            base = _as_dtype(quantize(W, spec), dtype)
            factors = dataclasses.replace(factors, B=torch.zeros_like(factors.B))
            best, error = 0, plain
    return Initialised(
        base=base,
        A=factors.A,
        B=factors.B,
        method=chosen.name,
        rank=request.rank,
        scaling=scaling,
        error_plain=None if plain is None else plain.weight,
        error=error.weight,
        output_error_plain=None if plain is None else plain.output,
        output_error=error.output,
        trace=solution.trace,
        best=best,
        seconds=0.0,
    )


def embedding_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """PEFT's ``lora_embedding_A`` (r, num_embeddings) and ``lora_embedding_B`` (dim, r).

    An embedding weight (num_embeddings, dim) is solved as it lies, because its rows are what is quantised in
    blocks: B is (num_embeddings, r) and A (r, dim). PEFT adds the transpose of lora_B @ lora_A.
    """
    return B.T.contiguous(), A.T.contiguous()


def moments(inputs: Tensor) -> tuple[Tensor, Tensor, int]:
    """Second moment E[x x^T] (in, in), mean (in,) and count of inputs (..., in), the first two in float32."""
    X = inputs.reshape(-1, inputs.shape[-1]).float()
    return X.T @ X / X.shape[0], X.mean(dim=0), X.shape[0]


def _method(method: str | Method) -> Method:
    if isinstance(method, Method):
        return method
    from qlora_engine.inits import get  # the registry imports this file

    return get(method)


def _checked(
    weight: Tensor, method: Method, request: InitRequest, scaling: float, factor_dtype: torch.dtype
) -> tuple[Tensor, float]:
    """The weight in float32 and its norm, once everything that is given has been found usable."""
    title = "weight" if request.name is None else f"weight {request.name!r}"
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{title} is {weight.dtype}; allowed: {', '.join(map(str, FLOAT_DTYPES))}")
    if not factor_dtype.is_floating_point:
        raise TypeError(f"factor_dtype is {factor_dtype}; it must be a floating-point type")
    if weight.ndim != 2 or weight.numel() == 0:
        raise InputError(f"{title} has shape {tuple(weight.shape)}; expected (out_features, in_features)")
    check_rank(request.rank, weight.shape, request.name)
    if not (scaling > 0 and math.isfinite(scaling)):
        raise InputError(f"{title}: scaling {scaling!r} must be positive and finite")
    if method.quantizes and request.spec is None:
        raise InputError(f"{method.name} quantises the base: it needs a spec")
    if method.needs_hessian and request.hessian is None:
        raise InputError(f"{method.name} needs the second moment of the layer's inputs")
    in_features = weight.shape[1]
    square, diagonal = (in_features, in_features), (in_features,)
    for field, shapes in (("hessian", (square, diagonal)), ("mean", (diagonal,))):
        given = getattr(request, field)
        if given is not None and given.shape not in shapes:
            expected = " or ".join(map(str, shapes))
            raise InputError(f"{title}: {field} has shape {tuple(given.shape)}, expected {expected}")
    if request.hessian is not None:
        diagonal_ = request.hessian.diagonal() if request.hessian.ndim == 2 else request.hessian
        if not bool(torch.isfinite(request.hessian.sum())):
            raise InputError(f"{title}: the second moment of its inputs holds values that are not finite")
        if bool((diagonal_ < 0).any()):
            raise InputError(f"{title}: the second moment of its inputs has a negative diagonal entry")
    only_diagonal = request.hessian is not None and request.hessian.ndim == 1
    if only_diagonal and method.needs_hessian and not method.diagonal_hessian:
        raise InputError(f"{title}: {method.name} needs the whole second moment, not its diagonal alone")
    W = weight.detach().float().contiguous()
    norm = frobenius(W)
    if not math.isfinite(norm):
        bad = int((~torch.isfinite(W)).sum())
        raise InputError(f"{title} {tuple(W.shape)} has {bad} elements that are NaN or inf")
    largest = _LARGEST_NORM if request.hessian is None else _LARGEST_NORM_SQUARED
    if norm > largest:
        raise InputError(f"{title} has a norm of {norm:.3g}; at most {largest:.0e} can be solved in float32")
    return W, norm


def _stored(
    W: Tensor,
    dtype: torch.dtype,
    method: Method,
    solution: Solution,
    request: InitRequest,
    scaling: float,
    factor_dtype: torch.dtype,
) -> tuple[QuantizedTensor | Tensor | None, LowRankFactors]:
    factors = solution.factors.divided(scaling) if method.corrects else solution.factors
    factors = LowRankFactors(factors.A.to(factor_dtype).contiguous(), factors.B.to(factor_dtype).contiguous())
    if solution.base is not None:
        return _as_dtype(solution.base, dtype), factors
    # Against the factors as rounded: what rounding took from them, the base still has.
    base = _left(W, None, factors, scaling) if method.corrects else W
    if request.spec is not None:
        quantised = quantize(base, request.spec, scales=request.scales, name=request.name)
        return _as_dtype(quantised, dtype), factors
    return (base.to(dtype) if method.corrects else None), factors


def _as_dtype(base: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """The same codes, to be dequantised to the original's dtype (float64 has no kernels: float32).

    Raises:
        InputError: values beyond float16's largest.
    """
    found = dataclasses.replace(base, dtype=torch.float32 if dtype == torch.float64 else dtype)
    try:
        refuse_overflow(found)
    except ValueError as error:
        raise InputError(str(error)) from error
    return found


def _left(
    W: Tensor, base: QuantizedTensor | Tensor | None, factors: LowRankFactors | None, scaling: float
) -> Tensor:
    """W - base - scaling * B @ A in float32, from what is stored; None leaves a term out."""
    if isinstance(base, QuantizedTensor):
        left = base.dequantize(torch.float32)
        torch.sub(W, left, out=left)
    else:
        left = W.clone() if base is None else W - base.float()
    if factors is not None:
        left.addmm_(factors.B.float(), factors.A.float(), alpha=-scaling)
    return left


class _Error(NamedTuple):
    """Relative errors: the weight's, in Frobenius norm, and its output's, if its inputs are known."""

    weight: float
    output: float | None

    def in_terms_of(self, method: Method) -> float:
        """What the method minimises."""
        return self.output if method.needs_hessian and self.output is not None else self.weight


def _measure(E: Tensor, W: Tensor, norm: float, hessian: Tensor | None) -> _Error:
    error = relative(frobenius(E), norm)
    if hessian is None:
        return _Error(error, None)
    H = hessian.to(device=W.device, dtype=torch.float32)
    return _Error(error, relative(math.sqrt(_squared(E, H)), math.sqrt(_squared(W, H))))


def _squared(X: Tensor, H: Tensor) -> float:
    """tr(X H X^T) in blocks of rows, H (in, in) or diagonal (in,)."""
    total = X.new_zeros((), dtype=torch.float64)
    for rows in X.split(_ROWS):
        seen = rows * H if H.ndim == 1 else rows @ H
        total += seen.mul_(rows).sum(dim=1).double().sum()
    return max(float(total), 0.0)
