"""What ``loftq-init`` wrote, read again from disk and held against what the solver said of it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import InputError
from .fingerprint import FINGERPRINT_FILE, Fingerprint, module_digest, most
from .layer_plan import LayerPlan
from .plan import Plan
from .report import LayerReport, RunReport
from .safetensors_io import Writable
from .serialise import rest_tensor
from .stored_layer import StoredRun, oriented

# Two float32 evaluations of one error: relative to it, and (for an error near 0) to the weight.
_RELATIVE, _ABSOLUTE = 1e-4, 1e-6
_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Verified:
    """What was checked and found in order.

    Attributes:
        layers: Quantised weights that were read again.
        others: Tensors that were not quantised, equal to the original's to the byte (or converted as asked).
        difference: Largest |error on disk - error reported| / error reported.
        layer: Where that was.
        seconds: It took.
    """

    layers: int
    others: int
    difference: float
    layer: str
    seconds: float

    def __str__(self) -> str:
        return (
            f"Verified: {self.layers} layers read again, their errors within {self.difference:.1e} of the "
            f"report's; {self.others} other tensors as they were ({self.seconds:.1f} s)"
        )


def verify(plan: Plan, out: Path, progress: Callable[[str], None] | None = None) -> Verified:
    """Read everything in ``out`` and compare it with the original and with the report.

    One weight is in memory at a time. Codes and scales must hash to the fingerprint, the relative error of
    what is stored must be the report's, and every other tensor must be the original's.

    Args:
        plan: Of the run that wrote ``out``.
        out: Its output.
        progress: Called with each layer's name.

    Raises:
        InputError: something differs, is missing or cannot be read; the message says what, and the remedy.
    """
    began = time.perf_counter()
    report, stored = RunReport.read(out), StoredRun.open(out)
    by_name = {layer.name: layer for layer in report.layers}
    digests = _digests(out)
    problems: list[str] = []
    worst, where = 0.0, ""
    for layer in plan.layers:
        if progress is not None:
            progress(layer.path)
        try:
            said = by_name[layer.path]
            difference = _difference(layer, said, stored, digests)
        except KeyError:
            problems.append(f"'{layer.path}' is not in the report")
            continue
        except (InputError, OSError) as error:
            problems.append(f"'{layer.path}': {error}")
            continue
        if difference >= worst:
            worst, where = difference, layer.path
    others = plan.rest
    for entry in others:
        found = stored.checkpoint.tensors.get(entry.name)
        if found is None or _hash(found) != _hash(rest_tensor(plan, entry)):
            problems.append(f"'{entry.name}' {'is missing' if found is None else 'is not the original'}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(
            f"{out} is not what was solved: {'; '.join(most(problems))}{more}; "
            "write it again with --overwrite"
        )
    return Verified(len(plan.layers), len(others), worst, where, time.perf_counter() - began)


def _digests(out: Path) -> Mapping[str, str]:
    try:
        fingerprint = Fingerprint.read(out)
    except ValueError as error:
        raise InputError(f"{out}: {error}") from error
    if fingerprint is None:
        raise InputError(f"{out} has no {FINGERPRINT_FILE}")
    return fingerprint.digests


def _difference(layer: LayerPlan, said: LayerReport, stored: StoredRun, digests: Mapping[str, str]) -> float:
    """|error on disk - error reported| / error reported.

    Raises:
        InputError: it is more than rounding, or the codes are others.
    """
    quantized = stored.quantized(said, layer.entry.name)
    if quantized is not None and module_digest(quantized) != digests.get(layer.path):
        raise InputError("its codes or scales are not those of the fingerprint")
    W = oriented(layer.entry.read(), said.kind)
    error = relative_error(W, stored.base(said, layer.entry.name), stored.correction(said), said.scaling)
    apart = abs(error - said.error)
    if not apart <= _RELATIVE * said.error + _ABSOLUTE:
        raise InputError(f"its error is {error:.6g}, the report says {said.error:.6g}")
    return apart / said.error if said.error else 0.0


def relative_error(W: Tensor, base: Tensor, factors: tuple[Tensor, Tensor] | None, scaling: float) -> float:
    """||W - base - scaling * B @ A||_F / ||W||_F of (out, in) weights, by blocks of rows."""
    missing = whole = 0.0
    step = max(1, _ELEMENTS // max(1, W.shape[1]))
    for start in range(0, W.shape[0], step):
        rows = slice(start, start + step)
        left = W[rows].float()
        whole += float(left.square().sum(dtype=torch.float64))
        left = left - base[rows].float()
        if factors is not None:
            A, B = factors
            left.addmm_(B[rows], A, alpha=-scaling)
        missing += float(left.square_().sum(dtype=torch.float64))
    return float((missing / whole) ** 0.5) if whole else float(missing > 0)


def _hash(tensor: Writable) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    for chunk in tensor.chunks():
        digest.update(chunk)
    return digest.hexdigest()
