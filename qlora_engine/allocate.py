"""Mixed precision: which format each layer gets, so that the total error is least within a budget of bits.

    specs = candidate_specs(["nf2", "nf3", "nf4"], [32, 64, 128])
    choices = layer_choices(named_weights, specs, calibration, calibration.sensitivities)
    allocation = allocate(choices, budget=2.75)
    allocation.specs["model.layers.0.mlp.down_proj"]      # QuantSpec("nf3", 64)

One candidate a layer, an integer program solved by HiGHS. Source: LQ-LoRA, Guo et al., arXiv 2311.12023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from qlora_engine.errors import InputError
from qlora_engine.hessian import energy
from quant import QuantSpec, quantize

Approximate = Callable[[Tensor, QuantSpec], Tensor]
_Option = tuple[QuantSpec, int, float]  # spec, bits, weighted error


@dataclass(frozen=True)
class Candidate:
    """One way to store a layer.

    Attributes:
        spec: The format.
        bits: Bits that it takes, codes, scales and zeros together.
        error: What it costs, in the unit in which layers are added up.
    """

    spec: QuantSpec
    bits: int
    error: float


@dataclass(frozen=True)
class LayerChoices:
    """A layer and the ways to store it.

    Attributes:
        name: Module path.
        numel: Elements of its weight.
        candidates: At least one.
        weight: Factor of its errors in the sum.
        group: Layers of the same group get the same spec.
        estimated: How much the loss minds it was not measured: it counts as layers like it do.
    """

    name: str
    numel: int
    candidates: tuple[Candidate, ...]
    weight: float = 1.0
    group: str | None = None
    estimated: bool = False


@dataclass(frozen=True)
class Allocation:
    """The chosen map.

    Attributes:
        specs: Layer -> format.
        budget: Bits a weight that were allowed.
        bits_per_weight: Bits a weight that it takes, scales included; never more than ``budget``.
        error: Weighted sum of the chosen errors.
    """

    specs: dict[str, QuantSpec]
    budget: float
    bits_per_weight: float
    error: float


def candidate_specs(
    formats: Iterable[str], block_sizes: Iterable[int] = (64,), double_quant: Iterable[bool] = (False,)
) -> list[QuantSpec]:
    """Every combination, in a fixed order."""
    return [QuantSpec(*choice) for choice in product(formats, block_sizes, double_quant)]


def scale_searched(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Quantise with searched scales of either sign and nothing else: dequantised float32, as ``weight``."""
    return quantize(weight, spec, scales="signed-mse").dequantize(torch.float32)


def measure(
    weight: Tensor,
    specs: Iterable[QuantSpec],
    hessian: Tensor | None = None,
    *,
    sensitivity: Tensor | None = None,
    approximate: Approximate = scale_searched,
) -> tuple[Candidate, ...]:
    """What each format costs this layer, in a unit in which layers can be added up.

    With ``sensitivity`` the error is the layer's part of the loss of the whole model,
    1/2 sum_o s_o (E H E^T)_oo: the second-order term of KL(model, quantised model) a token, the gradients of
    different outputs taken as uncorrelated. Without it the error is relative, tr(E H E^T) / tr(W H W^T),
    which assumes that every layer's relative output error does the same harm. A layer that was fed nothing
    but zeros is measured as one without a Hessian: its error is not known to be harmless.

    Args:
        weight: Dense weight (out, in), any float dtype.
        specs: Formats to try.
        hessian: Second moment of the inputs, (in, in) or its diagonal (in,); None takes the identity.
        sensitivity: Mean squared gradient by output, (out,) (``sensitivity.output_sensitivity``).
        approximate: Maps (weight, spec) to what will stand in for the weight, float32: plain quantisation
            with scale search unless given. Pass the method in use, factors included, where they matter.

    Raises:
        InputError: weight, Hessian or sensitivity that are not finite or do not fit together.
    """
    dense = weight.detach().float()
    hessian = None if hessian is None else hessian.to(dense.device)
    if dense.ndim != 2 or (hessian is not None and hessian.shape[-1] != dense.shape[1]):
        shape = None if hessian is None else tuple(hessian.shape)
        raise InputError(f"weight {tuple(dense.shape)} with hessian {shape}; expected (out, in) and (in, in)")
    if sensitivity is not None and sensitivity.shape != dense.shape[:1]:
        raise InputError(f"sensitivity {tuple(sensitivity.shape)} for a weight of {dense.shape[0]} outputs")
    if sensitivity is None:
        rows, scale = None, energy(dense, hessian)
        if scale == 0 and hessian is not None:
            hessian, scale = None, energy(dense, None)
    else:
        # Scaling a row by sqrt(s_o / 2) makes its squared output error count s_o / 2 times.
        rows, scale = (sensitivity.to(dense.device, torch.float32) / 2).sqrt()[:, None], 1.0
    found = []
    for spec in specs:
        error = dense - approximate(dense, spec).to(dense.device, torch.float32)
        cost = energy(error if rows is None else rows * error, hessian) / (scale or 1.0)
        if not np.isfinite(cost):
            raise InputError(f"the error of {spec.format} is {cost}: is the weight finite?")
        found.append(Candidate(spec, 8 * spec.nbytes(dense.numel()), cost))
    return tuple(found)


def layer_choices(
    weights: Iterable[tuple[str, Tensor]],
    specs: Sequence[QuantSpec],
    hessians: Mapping[str, Tensor] | None = None,
    sensitivities: Mapping[str, Tensor] | None = None,
    *,
    groups: Mapping[str, str] | None = None,
    approximate: Approximate = scale_searched,
) -> list[LayerChoices]:
    """``measure`` for a stream of weights, one at a time.

    With sensitivities, a layer without one, or with none but zeros (an expert that no token reached, an
    embedding), is not free: its relative weight error counts as much, weight for weight, as the relative
    output error of the layers of its shape does in the median, or of all layers where none has its shape.

    Args:
        weights: (name, dense weight (out, in)).
        specs: Formats to try.
        hessians: H by name, a ``Calibration`` for instance; layers without one take the identity.
        sensitivities: By name. Empty or None: every error is relative.
        groups: Name -> label; layers with one label will get one spec (``Calibration.groups``).
        approximate: As in ``measure``.

    Raises:
        InputError: as ``measure``.
    """
    made: list[LayerChoices] = []
    minded: list[tuple[torch.Size, float]] = []  # shape, loss a weight of a layer all of whose output is lost
    shapes: list[torch.Size] = []
    for name, weight in weights:
        sensitivity = sensitivities.get(name) if sensitivities else None
        if sensitivity is not None and sensitivity.shape != weight.shape[:1]:
            # The disk has a part of what the model stacks (an expert's gate and up): they share the mean.
            sensitivity = sensitivity.mean().expand(weight.shape[0])
        hessian = hessians.get(name) if hessians is not None else None
        if sensitivity is not None:
            lost = _loss(weight, hessian, sensitivity) / weight.numel()
            sensitivity = sensitivity if lost > 0 else None
        if sensitivity is not None:
            minded.append((weight.shape, lost))
        elif sensitivities:
            hessian = None
        found = measure(weight, specs, hessian, sensitivity=sensitivity, approximate=approximate)
        group = groups.get(name) if groups else None
        estimated = bool(sensitivities) and sensitivity is None
        made.append(LayerChoices(name, weight.numel(), found, group=group, estimated=estimated))
        shapes.append(weight.shape)
    if not minded:
        return [replace(layer, estimated=False) for layer in made]
    return [
        replace(layer, weight=_typical(shape, minded) * layer.numel) if layer.estimated else layer
        for layer, shape in zip(made, shapes)
    ]


def _loss(weight: Tensor, hessian: Tensor | None, sensitivity: Tensor) -> float:
    """What losing all of a layer's output costs, in the unit of ``measure`` with ``sensitivity``."""
    rows = (sensitivity.to(weight.device, torch.float32) / 2).sqrt()[:, None]
    return energy(rows * weight.float(), None if hessian is None else hessian.to(weight.device))


def _typical(shape: torch.Size, minded: Sequence[tuple[torch.Size, float]]) -> float:
    """The median loss a weight of the layers of that shape, or of all."""
    alike = [lost for other, lost in minded if other == shape]
    return median(alike or [lost for _, lost in minded])


def allocate(layers: Sequence[LayerChoices], budget: float) -> Allocation:
    """Choose one candidate a layer so that the weighted sum of errors is least.

    Args:
        layers: Every name once; layers of a group must share at least one spec.
        budget: Average bits a weight over all these layers, scales included.

    Returns:
        The optimum (within 1e-6 of it), the same for the same input. Adapters are not counted.

    Raises:
        InputError: nothing fits: the message has the least budget that would. Or no layers, a layer twice or
            without candidates, a negative or infinite error or weight, a group without a common spec.
    """
    units = _units(layers)
    numel = sum(layer.numel for layer in layers)
    least = sum(min(bits for _, bits, _ in unit.options) for unit in units)
    # 3.5 * numel must not lose its last bit to rounding.
    allowed = math.floor(budget * numel * (1 + 1e-12)) if math.isfinite(budget) else -1
    if allowed < least:
        needed = math.ceil(1e4 * least / numel) / 1e4
        raise InputError(
            f"a budget of {budget:g} bits a weight cannot be met: these formats take at least {needed:.4f}"
        )
    chosen = _solve(units, allowed)
    specs = {name: option[0] for unit, option in zip(units, chosen) for name in unit.names}
    return Allocation(
        specs={layer.name: specs[layer.name] for layer in layers},
        budget=float(budget),
        bits_per_weight=sum(bits for _, bits, _ in chosen) / numel,
        error=float(sum(error for _, _, error in chosen)),
    )


@dataclass(frozen=True)
class _Unit:
    """Layers that are decided together, and their undominated options (spec, bits, weighted error)."""

    names: tuple[str, ...]
    options: tuple[_Option, ...]


def _units(layers: Sequence[LayerChoices]) -> list[_Unit]:
    if not layers:
        raise InputError("no layers to choose formats for")
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        raise InputError(f"layer {next(n for n in names if names.count(n) > 1)} is given twice")
    grouped: dict[tuple[str, str], list[LayerChoices]] = {}
    for layer in layers:
        key = ("layer", layer.name) if layer.group is None else ("group", layer.group)
        grouped.setdefault(key, []).append(layer)
    return [_unit(members) for members in grouped.values()]


def _unit(members: list[LayerChoices]) -> _Unit:
    for layer in members:
        values = [layer.weight, *(c.error for c in layer.candidates)]
        if not layer.candidates:
            raise InputError(f"{layer.name} has no candidates")
        if not all(np.isfinite(value) and value >= 0 for value in values):
            raise InputError(f"{layer.name}: errors and weight must be finite and not negative, got {values}")
    tables = [{c.spec: c for c in layer.candidates} for layer in members]
    common = [spec for spec in tables[0] if all(spec in table for table in tables)]
    if not common:
        raise InputError(f"group {members[0].group}: its layers share no format")
    options = [
        (
            spec,
            sum(table[spec].bits for table in tables),
            float(sum(layer.weight * table[spec].error for layer, table in zip(members, tables))),
        )
        for spec in common
    ]
    # Drop what another option beats in both; a stable sort keeps the candidates' order among equals.
    options.sort(key=lambda option: (option[1], option[2]))
    kept = [options[0]]
    for option in options[1:]:
        if option[2] < kept[-1][2]:
            kept.append(option)
    return _Unit(tuple(layer.name for layer in members), tuple(kept))


def _solve(units: list[_Unit], allowed: int) -> list[_Option]:
    """The options of least error with at most ``allowed`` bits in all."""
    owner = [n for n, unit in enumerate(units) for _ in unit.options]
    options = [option for unit in units for option in unit.options]
    bits = np.array([bits for _, bits, _ in options], dtype=np.float64)
    errors = np.array([error for _, _, error in options])
    one_each = csr_array((np.ones(len(owner)), (owner, range(len(owner)))), shape=(len(units), len(owner)))
    # HiGHS stops within 1e-6 of the optimum: in units of a lower bound on it, whatever the errors' own unit.
    floor = sum(min(error for _, _, error in unit.options) for unit in units)
    cost = errors / (floor or errors.max() or 1.0)
    chosen = [min(unit.options, key=lambda option: option[1]) for unit in units]
    spare = 0.0
    while spare < 1.0:
        # The budget as a fraction of itself. HiGHS lets a row be off by 1e-6: then it is asked for less.
        within = LinearConstraint(csr_array(bits[None, :] / allowed), ub=1.0 - spare)
        result = milp(
            cost,
            constraints=[LinearConstraint(one_each, lb=1, ub=1), within],
            integrality=np.ones(len(options), dtype=np.int64),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 1e-6},
        )
        if result.x is None:
            break
        picked = [options[n] for n in np.flatnonzero(result.x > 0.5)]
        if sum(option[1] for option in picked) <= allowed:
            chosen = picked
            break
        spare = spare * 2 or 1e-6
    return _fill(units, chosen, allowed)


def _fill(units: list[_Unit], chosen: list[_Option], allowed: int) -> list[_Option]:
    """Spend what the solver's tolerance left over: the upgrade that helps most, while one fits."""
    chosen = list(chosen)
    while True:
        left = allowed - sum(option[1] for option in chosen)
        upgrades = [
            (now[2] - option[2], n, option)
            for n, (unit, now) in enumerate(zip(units, chosen))
            for option in unit.options
            if option[2] < now[2] and option[1] - now[1] <= left
        ]
        if not upgrades:
            return chosen
        _, n, option = max(upgrades, key=lambda upgrade: upgrade[:2])
        chosen[n] = option
