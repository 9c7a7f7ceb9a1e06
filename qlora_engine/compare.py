"""Several runs side by side: read from disk or from a model in memory, grouped, explained."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .files import read_json_object
from .report import REPORT_FILE, LayerReport, RunReport, geometric_mean

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Run:
    """A report with the short name that stands for it in tables."""

    label: str
    report: RunReport


@dataclass(frozen=True)
class Group:
    """Layers of one run that are the same kind of module: all ``self_attn.q_proj``, say.

    Attributes:
        kind: Module path without the block's number.
        layers: How many.
        weights: In all of them.
        bits_per_weight: Mean, weighted by size, scales included.
        error_plain, error: Geometric means.
        output_error: Geometric mean; None unless every layer has one.
        seconds: To solve, summed.
        bytes: On disk, summed, adapter not counted.
    """

    kind: str
    layers: int
    weights: int
    bits_per_weight: float
    error_plain: float
    error: float
    output_error: float | None
    seconds: float
    bytes: int


def kind_of(name: str) -> str:
    """The path with its block's number taken out: ``model.layers.3.mlp.up_proj`` -> ``mlp.up_proj``."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers and numbers[0] + 1 < len(parts) else name


def groups(layers: Iterable[LayerReport]) -> list[Group]:
    """The layers by kind, in order of their first."""
    by_kind: dict[str, list[LayerReport]] = {}
    for layer in layers:
        by_kind.setdefault(kind_of(layer.name), []).append(layer)
    return [_group(kind, members) for kind, members in by_kind.items()]


def _group(kind: str, members: Sequence[LayerReport]) -> Group:
    weights = sum(layer.numel for layer in members)
    bits = sum(layer.bits_per_weight * layer.numel for layer in members)
    outputs = [layer.output_error for layer in members if layer.output_error is not None]
    return Group(
        kind,
        len(members),
        weights,
        bits / weights if weights else 0.0,
        geometric_mean(layer.error_plain for layer in members),
        geometric_mean(layer.error for layer in members),
        geometric_mean(outputs) if len(outputs) == len(members) else None,
        sum(layer.seconds for layer in members),
        sum(layer.bytes_out for layer in members),
    )


def why(layer: LayerReport, layers: Sequence[LayerReport]) -> str:
    """What sets a layer apart from the others of its run, in numbers."""
    reasons = []
    widths = [other.bits_per_weight for other in layers]
    if layer.bits_per_weight < statistics.median(widths) * 0.98:
        reasons.append(
            f"{layer.bits_per_weight:.2f} bits where the median is {statistics.median(widths):.2f}"
        )
    same = [other.error_plain for other in layers if other.format == layer.format]
    middle = statistics.median(same)
    if layer.error_plain > 1.02 * middle:
        heavier = 100 * (layer.error_plain / middle - 1)
        reasons.append(f"harder to quantise: plain error {heavier:.0f} % above the median of {layer.format}")
    gain, usual = layer.gain, statistics.median(other.gain for other in layers)
    smaller = min(layer.shape)
    if layer.rank == 0:
        reasons.append("it has no adapter")
    elif gain < 0.95 * usual:
        share = 100 * layer.rank / smaller
        reasons.append(
            f"the adapter takes {100 * gain:.0f} % off where the median is {100 * usual:.0f} %: "
            f"rank {layer.rank} is {share:.1f} % of {smaller}"
        )
    return "; ".join([*reasons, *([layer.note] if layer.note else [])]) or "near the median in every respect"


def plain(run: Run) -> Run:
    """The same weights in the same formats without adapters: the baseline that the run's report carries."""
    layers = tuple(
        dataclasses.replace(
            layer,
            error=layer.error_plain,
            output_error=layer.output_error_plain,
            rank=0,
            trace=(),
            best=0,
            iterations=0,
            seconds=0.0,
            note="",
        )
        for layer in run.report.layers
    )
    report = dataclasses.replace(
        run.report, layers=layers, command="", adapter_bytes=0, seconds=0.0, peak_rss=0, notes=()
    )
    widths = sorted({layer.format for layer in layers})
    return Run(f"plain {', '.join(widths)}", report)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs that wrote the given folders (or ``report.json`` files), with labels that tell them apart.

    Raises:
        InputError: no report there, or one that cannot be read.
    """
    reports = []
    for path in paths:
        if path.is_file():
            reports.append(RunReport.from_json(read_json_object(path)))
        elif path.is_dir():
            beside = (path.absolute().parent / REPORT_FILE).exists()  # of the adapter's folder
            is_here = (path / REPORT_FILE).exists() or not beside
            reports.append(RunReport.read(path if is_here else path.absolute().parent))
        else:
            raise InputError(f"no such folder or report: {path}")
    return [Run(label, report) for label, report in zip(_labels(paths), reports, strict=True)]


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that are all different; given twice, a number tells them apart."""
    whole = [(path.parent if path.name == REPORT_FILE else path).absolute() for path in paths]
    longest = max(len(path.parts) for path in whole)
    for depth in range(1, longest + 1):
        labels = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(labels)) == len(set(whole)):
            break
    return [
        f"{label} ({labels[: i + 1].count(label)})" if labels[:i].count(label) else label
        for i, label in enumerate(labels)
    ]


class ErrorTable(Sequence[LayerReport]):
    """The layers of one model, as ``error_report`` returns them; shows itself in a terminal."""

    def __init__(self, layers: Iterable[LayerReport]) -> None:
        self._layers = tuple(layers)

    def __getitem__(self, index: Any) -> Any:
        return self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    def to_json(self) -> list[dict[str, Any]]:
        """JSON-able rows."""
        return [layer.to_json() for layer in self._layers]

    def __rich__(self) -> RenderableType:
        from .compare_table import layers_table

        return layers_table(self._layers)

    def __str__(self) -> str:
        from rich.console import Console

        screen = Console(width=120, color_system=None)
        with screen.capture() as captured:
            screen.print(self)
        return captured.get()


def error_report(source: Any) -> ErrorTable:
    """What each quantised layer lost and what its adapter repairs.

    Args:
        source: A model that ``get_peft_model`` initialised with ``init_lora_weights="loftq"``, a folder that
            ``loftq-init`` wrote, a RunReport, or LayerReports.

    Returns:
        A sequence of LayerReport: relative errors ||W - W'||_F / ||W||_F, bits, rank, iterations, seconds.

    Raises:
        InputError: nothing there records errors.
    """
    if isinstance(source, RunReport):
        return ErrorTable(source.layers)
    if isinstance(source, (str, Path)):
        return ErrorTable(read_runs([Path(source)])[0].report.layers)
    if hasattr(source, "named_modules"):
        found = list(_layers_of(source))
        if not found:
            raise InputError(
                f"{type(source).__name__} has no layer that was initialised from its weight in this process; "
                "give the folder that loftq-init wrote, or use init_lora_weights='loftq'"
            )
        return ErrorTable(found)
    layers = list(source)
    if not all(isinstance(layer, LayerReport) for layer in layers):
        raise InputError(f"{type(source).__name__} is neither a model, a folder nor a report")
    return ErrorTable(layers)


def _layers_of(model: Any) -> Iterator[LayerReport]:
    """The records that initialising an adapter left on the model's layers."""
    from quant.linear import QuantEmbedding, QuantizedModule

    from .base_weight import is_conv1d

    for name, module in model.named_modules():
        for record in getattr(module, "init_records", {}).values():
            base = module.get_base_layer()
            if record.spec is None or not isinstance(base, QuantizedModule):
                continue
            quantized = base.quantized()
            kind = "embedding" if isinstance(base, QuantEmbedding) else "linear"
            yield LayerReport(
                name=record.name or name,
                kind="conv1d" if is_conv1d(base) else kind,
                shape=tuple(quantized.shape),
                format=record.spec.format,
                block_size=record.spec.block_size,
                double_quant=record.spec.double_quant,
                rank=record.rank,
                scaling=record.scaling,
                bits_per_weight=quantized.bits_per_weight,
                weight_norm=0.0,  # not recorded
                error_plain=record.error_plain,
                error=record.error,
                output_error_plain=record.output_error_plain,
                output_error=record.output_error,
                note=record.note,
                trace=record.trace,
                iterations=max(len(record.trace) - 1, 0),
                seconds=record.seconds,
                bytes_in=quantized.shape.numel() * quantized.dtype.itemsize,
                bytes_out=quantized.nbytes,
            )
