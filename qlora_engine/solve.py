"""One layer of ``loftq-init``: a weight as it lies on disk in, what is stored and what it cost out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant import QuantizedTensor

from .adapter_io import factor_names
from .calibration_result import Calibration
from .fingerprint import dense_digest, module_digest
from .inits import Initialised, embedding_factors, get, initialise, initialise_many
from .layer_plan import LayerPlan
from .plan import Plan
from .report import LayerReport
from .safetensors_io import DenseTensor
from .serialise import dense_base, layer_tensors

_ELEMENTS = 1 << 20  # of a weight that are measured at once: 4 MB in float32


@dataclass(frozen=True)
class SolvedLayer:
    """What is kept of a layer.

    Attributes:
        base: Tensors of the checkpoint.
        factors: Tensors of the adapter; none for a layer without one.
        digest: Of the codes and scales, or of what they are dequantised to where that is saved.
        report: What it cost.
    """

    base: list[DenseTensor]
    factors: list[DenseTensor]
    digest: str
    report: LayerReport


def solve_layer(
    plan: Plan,
    layer: LayerPlan,
    weight: Tensor,
    device: torch.device,
    calibration: Calibration | None = None,
) -> SolvedLayer:
    """Quantise and correct one weight.

    Args:
        plan: The run's.
        layer: Which one.
        weight: As it lies on disk: (out, in), for a Conv1D (in, out), for an embedding (rows, dim).
        device: To compute on.
        calibration: Second moments of the layers' inputs. A layer without one is solved by LoftQ with scale
            search, and its report says why.

    Raises:
        InputError: NaN or inf in the weight, naming it; values beyond what is saved in float16.
    """
    began = time.perf_counter()
    options, kind = plan.options, layer.module.kind
    W = _as_solved(layer, weight, device)
    # Without an adapter: plain quantisation, measured in the same place; its factors are dropped.
    method, scales, note = options.method if layer.rank else "qlora", options.scales, ""
    hessian = None
    if calibration is not None and kind != "embedding":
        hessian = calibration.hessian(layer.path, weight)
        hessian = None if hessian is None else hessian.to(device)
    if get(method).needs_hessian and hessian is None:
        known = calibration is not None and kind != "embedding"
        why: str | None = "an embedding" if kind == "embedding" else "not calibrated"
        if known and calibration is not None:
            why = calibration.problem(layer.path)
        method, scales, note = "loftq", "signed-mse", f"solved by loftq, not {method}: {why}"
    solved = initialise(
        W,
        method=method,
        hessian=hessian,
        damping=options.damping,
        scales=scales,
        kind="embedding" if kind == "embedding" else "linear",
        name=layer.entry.name,
        **_common(plan, layer),
    )
    return _solved(plan, layer, W, solved, note, began)


def may_share(plan: Plan, layer: LayerPlan) -> tuple[Any, ...] | None:
    """A key: layers that have it in common can go through ``solve_group`` together. None: it cannot."""
    if not layer.rank or layer.module.kind == "embedding" or get(plan.options.method).solve_many is None:
        return None
    shape, kind = tuple(layer.module.shape), layer.module.kind
    return (shape, kind, layer.entry.dtype, layer.spec, layer.rank, layer.scaling)


def solve_group(
    plan: Plan, layers: Sequence[LayerPlan], weights: Sequence[Tensor], device: torch.device
) -> list[SolvedLayer]:
    """``solve_layer``, without calibration, for layers of one key at once; the same up to rounding.

    Args:
        plan: The run's.
        layers: Layers of one ``may_share`` key.
        weights: One a layer, as they lie on disk, or on the device already.
        device: To compute on.

    Raises:
        InputError: as ``solve_layer``.
    """
    began = time.perf_counter()
    solved = initialise_many(
        [_as_solved(layer, weight, device) for layer, weight in zip(layers, weights, strict=True)],
        [layer.entry.name for layer in layers],
        method=plan.options.method,
        scales=plan.options.scales,
        **_common(plan, layers[0]),
    )
    share = (time.perf_counter() - began) / len(layers)
    results = []
    for layer, weight, found in zip(layers, weights, solved, strict=True):
        W = _as_solved(layer, weight, device)
        # as if it had begun so long ago that its share of the time has passed
        results.append(_solved(plan, layer, W, found, "", time.perf_counter() - share))
    return results


def _as_solved(layer: LayerPlan, weight: Tensor, device: torch.device) -> Tensor:
    """The weight on the device, (out, in); of an embedding (rows, dim)."""
    W = weight.to(device)
    return W.T.contiguous() if layer.module.kind == "conv1d" else W


def _common(plan: Plan, layer: LayerPlan) -> dict[str, Any]:
    """What ``initialise`` is told about every layer alike."""
    options = plan.options
    return {
        "rank": layer.rank or 1,
        "spec": layer.spec,
        "scaling": layer.scaling,
        "factor_dtype": getattr(torch, options.adapter_dtype),
        "iters": options.iters,
        "svd": options.svd,
        "seed": options.seed,
    }


def _solved(
    plan: Plan, layer: LayerPlan, W: Tensor, solved: Initialised, note: str, began: float
) -> SolvedLayer:
    """What is kept of a solution, and its report."""
    kind = layer.module.kind
    assert isinstance(solved.base, QuantizedTensor)
    base = dataclasses.replace(solved.base, dtype=getattr(torch, plan.dtype))
    error, digest = solved.error, ""
    if plan.save_format == "dense":
        dense = dense_base(plan, layer, base)
        error, digest = _relative_error(W, dense, solved, layer), dense_digest(dense)
        del dense
    report = LayerReport(
        name=layer.path,
        kind=kind,
        shape=layer.module.shape,
        format=layer.spec.format,
        block_size=layer.spec.block_size,
        double_quant=layer.spec.double_quant,
        rank=layer.rank,
        scaling=layer.scaling,
        bits_per_weight=base.bits_per_weight,
        weight_norm=_norm(W),
        error_plain=solved.error_plain or 0.0,
        error=error,
        output_error_plain=solved.output_error_plain,
        output_error=solved.output_error,
        trace=solved.trace,
        best=solved.best,
        iterations=solved.iterations,
        seconds=time.perf_counter() - began,
        bytes_in=layer.entry.nbytes,
        bytes_out=plan.layer_bytes(layer),
        note=note or ("quantisation left nothing to correct" if _corrects_nothing(solved) else ""),
    )
    factors: list[DenseTensor] = []
    if layer.rank:
        pair = embedding_factors(solved.A, solved.B) if kind == "embedding" else (solved.A, solved.B)
        factors = [DenseTensor(n, t) for n, t in zip(factor_names(layer.path, kind), pair, strict=True)]
    return SolvedLayer(layer_tensors(plan, layer, base), factors, digest or module_digest(base), report)


def _corrects_nothing(solved: Initialised) -> bool:
    return solved.method != "qlora" and solved.best == 0


def _norm(W: Tensor) -> float:
    """||W||_F, summed over blocks of rows in float64."""
    total = torch.zeros((), dtype=torch.float64, device=W.device)
    for rows in W.split(_rows(W)):
        total += rows.float().square().sum(dtype=torch.float64)
    return float(total) ** 0.5  # the device is waited for once


def _rows(W: Tensor) -> int:
    return max(1, _ELEMENTS // max(1, W.shape[1]))


def _relative_error(W: Tensor, base: Tensor, solved: Initialised, layer: LayerPlan) -> float:
    """||W - base - scaling * B @ A||_F / ||W||_F for a base that was rounded to be saved."""
    total = torch.zeros((), dtype=torch.float64, device=W.device)
    step = _rows(W)
    for start in range(0, W.shape[0], step):
        rows = slice(start, start + step)
        left = W[rows].float() - base[rows].float()
        if layer.rank:
            left.addmm_(solved.B[rows].float(), solved.A.float(), alpha=-layer.scaling)
        total += left.square_().sum(dtype=torch.float64)
    squared, norm = float(total), _norm(W)
    return squared**0.5 / norm if norm else float(squared > 0)
