"""Several runs side by side, as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .compare import Run, groups, why
from .report import LayerReport
from .report_table import human_bytes, human_seconds, human_width, report_method
from .spectrum import Spectrum, share

_LARGEST = 16  # the commands' default rank


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    return table


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _percent(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %" if before else ""


def runs_table(runs: Sequence[Run]) -> Table:
    """One line a run: what it cost and what was left of the error."""
    table = _table(
        "Runs", ("run", "method"), ("bits", "size", "adapter", "plain", "error", "change", "output", "time")
    )
    for run in runs:
        totals = run.report.totals
        pair = totals["error_plain_mean"], totals["error_mean"]
        adapted = any(layer.rank for layer in run.report.layers)
        table.add_row(
            Text(run.label),
            Text(report_method(run.report) if adapted else "no adapter"),
            f"{totals['bits_per_weight']:.3f}",
            human_bytes(run.report.bytes_out),
            human_bytes(run.report.adapter_bytes),
            *map(_error, pair),
            _percent(*pair),
            _error(totals.get("output_error_mean")),
            human_seconds(run.report.seconds),
        )
    return table


def kinds_table(runs: Sequence[Run]) -> Table:
    """The error by kind of module, a column a run."""
    found = [{group.kind: group for group in groups(run.report.layers)} for run in runs]
    kinds = dict.fromkeys(kind for by_kind in found for kind in by_kind)
    table = _table(
        "Relative weight error by kind of module", ("module",), ("layers", *(r.label for r in runs))
    )
    for kind in kinds:
        count = max(by_kind[kind].layers for by_kind in found if kind in by_kind)
        errors = [_error(by_kind[kind].error) if kind in by_kind else "" for by_kind in found]
        table.add_row(Text(kind), str(count), *errors)
    return table


def worst_table(run: Run, count: int) -> Table:
    """The layers of the largest error and what sets them apart."""
    table = _table(f"Worst of {run.label}", ("layer",), ("format", "rank", "error"))
    table.add_column("why", overflow="fold")
    for layer in run.report.worst(count):
        cells = human_width(layer), str(layer.rank or "-"), _error(layer.error)
        table.add_row(Text(layer.name), *cells, Text(why(layer, run.report.layers)))
    return table


def layers_table(layers: Sequence[LayerReport]) -> Table:
    """Every layer of one model."""
    calibrated = any(layer.output_error is not None for layer in layers)
    names = ["shape", "format", "bits", "rank", "plain", "error", "change"]
    if calibrated:
        names += ["output plain", "output"]
    table = _table(f"{len(layers)} layers", ("layer",), (*names, "iterations", "seconds"))
    for layer in layers:
        outputs = [_error(layer.output_error_plain), _error(layer.output_error)] if calibrated else []
        table.add_row(
            Text(layer.name),
            "x".join(map(str, layer.shape)),
            human_width(layer),
            f"{layer.bits_per_weight:.3f}",
            str(layer.rank or "-"),
            _error(layer.error_plain),
            _error(layer.error),
            _percent(layer.error_plain, layer.error),
            *outputs,
            str(layer.iterations),
            f"{layer.seconds:.2f}",
        )
    return table


def spectra_table(spectra: Sequence[Spectrum]) -> Table:
    """How much of each residual its largest singular values hold: what an adapter of a rank can take away."""
    table = _table(
        f"Singular values of what is missing, over ||W||: share of its square in the largest {_LARGEST}",
        ("layer",),
        ("largest, plain", "largest, stored", "share, plain", "share, stored"),
    )
    for spectrum in spectra:
        pair = spectrum.before, spectrum.after
        cells = [_error(values[0]) for values in pair]
        cells += [f"{100 * share(values, _LARGEST):.1f} %" for values in pair]
        table.add_row(Text(spectrum.label), *cells)
    return table


def comparison(runs: Sequence[Run], *, worst: int, spectra: Sequence[Spectrum] = ()) -> RenderableType:
    """Everything that ``qlora-report`` prints."""
    parts: list[RenderableType] = [runs_table(runs), Text(), kinds_table(runs)]
    for run in runs:
        if any(layer.rank for layer in run.report.layers):
            parts += [Text(), worst_table(run, worst)]
    if spectra:
        parts += [Text(), spectra_table(spectra)]
    return Lines(*parts)
