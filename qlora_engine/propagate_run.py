"""``loftq-init --propagate``: layers solved as the texts reach them, behind what has become of those before.

One block is in memory at a time, with the second moments of its inputs and two streams of hidden states:
those of the model as it was and those of the model as it becomes. Each layer is solved once, for the weight
that ``drifted_target`` gives. A run that goes on after an interruption sends the texts through the layers
that are finished, as they were kept, and solves the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quant.bnb_format import from_bnb
from quant.linear_op import TENSOR_NAMES, as_quantized
from quant.tensor import quantize

from .adapter_io import factor_names
from .blocks import NotSequential
from .blockwise import BlockStep, walk_blocks
from .calibration_result import Calibration
from .errors import InputError
from .files import read_json_object, write_json
from .layer_plan import LayerPlan
from .partial_model import PartialModel
from .pieces import Pieces
from .plan import Plan
from .propagate import as_stored, layer_facts, target_of
from .report import LayerReport
from .solve import SolvedLayer, solve_layer
from .stored_layer import oriented
from .verify import relative_error

Progress = Callable[[LayerReport, bool], None]
_NOTES = "propagated.json"  # among the pieces: what to say of a pass that is done


@dataclass(frozen=True)
class Propagation:
    """What is sent through the model.

    Attributes:
        windows: Gives the token ids, int64 (n,) each; called once, and only if something is left to solve.
        max_full_width: Of wider inputs the diagonal of their second moment is kept; the original weight is
            what is solved for then.
        blend: See ``propagate``.
    """

    windows: Callable[[], Sequence[Tensor]]
    max_full_width: int | None = None
    blend: float = 0.5


# What was kept of a layer: the tensors of its base and of its factors, by name.
Kept = tuple[dict[str, Tensor], dict[str, Tensor]]


def reached(plan: Plan) -> list[LayerPlan]:
    """The layers that are solved on the way: all with inputs that a second moment is taken of.

    Embeddings and stacked experts are not among them: they are solved afterwards, and until then the texts
    run through the originals.
    """
    return [layer for layer in plan.layers if layer.module.kind != "embedding" and not layer.stack]


def solve_behind(
    plan: Plan,
    propagation: Propagation,
    device: torch.device,
    finished: Callable[[LayerPlan], Kept | None],
    keep: Callable[[LayerPlan, SolvedLayer], None],
) -> tuple[str, ...]:
    """Solve the layers of ``reached`` in the order in which the texts reach them.

    Args:
        plan: The run's.
        propagation: The texts.
        device: To compute on.
        finished: What an earlier run kept of a layer; None: it has yet to be solved.
        keep: Called with every layer that is solved here.

    Returns:
        Sentences for the report: tokens, time, what was not reached.

    Raises:
        InputError: a model that cannot be run block by block, or as ``solve_layer``.
    """
    began = time.perf_counter()
    solving = 0.0
    layers = {layer.path: layer for layer in reached(plan)}
    texts = list(propagation.windows())
    checkpoint = plan.checkpoint
    partial = PartialModel(
        checkpoint.folder, dtype=torch.float32, trust_remote_code=plan.options.trust_remote_code
    )
    facts = {}
    try:
        steps = walk_blocks(
            partial,
            texts,
            list(layers),
            inputs="both",
            device=device,
            max_full_width=propagation.max_full_width,
        )
        for step in steps:
            for name in step.targets:
                layer, moment = layers[name], step.replaced.get(name)
                facts[name] = layer_facts(name, moment)
                kept = finished(layer)
                if kept is None:
                    start = time.perf_counter()
                    moments = {} if moment is None else {name: moment.hessian}
                    calibration = Calibration({name: facts[name]}, moments)
                    solved = _solve(plan, layer, step, calibration, propagation.blend, device)
                    keep(layer, solved)
                    kept = _by_name(solved.base), _by_name(solved.factors)
                    solving += time.perf_counter() - start
                step.replace(name, as_stored(step, name, stand_in(plan, layer, kept)))
    except NotSequential as reason:
        raise InputError(f"--propagate: cannot run this model block by block: {reason}") from reason
    whole = Calibration(facts, {})
    missing = [name for name in facts if whole.problem(name) is not None]
    tokens = sum(window.numel() for window in texts)
    return (
        f"calibrated on {tokens} tokens in {len(texts)} windows behind the quantised blocks, "
        f"{time.perf_counter() - began - solving:.0f} s without solving; {len(missing)} of {len(facts)} "
        "layers without a second moment",
        "each layer was solved for its inputs behind the layers before it and for a weight that undoes some "
        "of their error: output errors are those of that weight, weight errors the original's",
    )


def _solve(
    plan: Plan,
    layer: LayerPlan,
    step: BlockStep,
    calibration: Calibration,
    blend: float,
    device: torch.device,
) -> SolvedLayer:
    """The layer solved for its target; errors of its weight are told of the original."""
    usable = calibration.problem(layer.path) is None
    target = target_of(step, layer.path, device=device, blend=blend if usable else 0.0)
    solved = solve_layer(plan, layer, as_stored(step, layer.path, target), device, calibration)
    W = oriented(layer.entry.read(), layer.module.kind).to(device)
    kept = _by_name(solved.base), _by_name(solved.factors)
    plain = quantize(W, layer.spec, name=layer.entry.name).dequantize(torch.float32)
    report = replace(
        solved.report,
        weight_norm=torch.linalg.vector_norm(W, dtype=torch.float64).item(),
        error_plain=relative_error(W, plain, None, 1.0),
        error=relative_error(W, stand_in(plan, layer, kept).to(device), None, 1.0),
    )
    return replace(solved, report=report)


def _by_name(tensors: Sequence[Any]) -> dict[str, Tensor]:
    return {tensor.name: tensor.tensor for tensor in tensors}


def stand_in(plan: Plan, layer: LayerPlan, kept: Kept) -> Tensor:
    """What will stand in for the weight: base and correction as they are saved, (out, in) float32.

    Args:
        plan: The run's.
        layer: Not an embedding.
        kept: Its tensors, by the names that they have in the output.
    """
    base, factors = kept
    shape = torch.Size(layer.module.shape)
    if plan.save_format == "dense":
        weight = oriented(base[layer.entry.name], layer.module.kind).float()
    elif plan.save_format == "bnb":
        weight = from_bnb(layer.entry.name, base).dequantize(torch.float32).reshape(shape)
    else:
        parts = [base.get(f"{layer.path}.{part}") for part in TENSOR_NAMES]
        weight = as_quantized(parts, layer.spec, shape, torch.float32).dequantize(torch.float32)
    if not factors:
        return weight
    A, B = (factors[name].float().to(weight.device) for name in factor_names(layer.path, layer.module.kind))
    return torch.addmm(weight, B, A, alpha=layer.scaling)


def propagation_notes(pieces: Pieces) -> tuple[str, ...]:
    """What ``propagate_layers`` has to say in the report; nothing where it was not run."""
    path = pieces.folder / _NOTES
    return tuple(map(str, read_json_object(path)["notes"])) if path.is_file() else ()


def propagate_layers(
    plan: Plan,
    pieces: Pieces,
    unsolved: list[int],
    device: torch.device,
    progress: Progress | None,
    propagation: Propagation,
) -> tuple[float, set[int]]:
    """Solve the layers numbered in ``unsolved`` as the texts reach them, and keep each among the ``pieces``.

    Returns:
        Seconds that earlier runs took for layers that were solved, and the numbers of all that are solved now
        and that ``progress`` was told of.

    Raises:
        InputError: as ``solve_behind``.
    """
    layers = reached(plan)
    if (pieces.folder / _NOTES).exists():
        return 0.0, set()  # an earlier run has been through: shards may have taken up what it kept
    report = progress if progress is not None else lambda *_: None
    earlier = 0.0

    def finished(layer: LayerPlan) -> Kept | None:
        nonlocal earlier
        if layer.index in unsolved:
            return None
        facts, _ = pieces.facts(layer)
        earlier += facts.seconds
        report(facts, True)
        base, factors = pieces.base(layer), pieces.factors(layer)
        return {e.name: e.read() for e in base}, {e.name: e.read() for e in factors}

    def keep(layer: LayerPlan, solved: SolvedLayer) -> None:
        pieces.put(layer, solved)
        report(solved.report, False)

    notes = solve_behind(plan, propagation, device, finished, keep)
    write_json(pieces.folder / _NOTES, {"notes": notes})
    return earlier, {layer.index for layer in layers}
