"""Several runs side by side as one self-contained HTML page: no network, light and dark, sortable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from .compare import Run, groups, why
from .report import LayerReport
from .report_html import cell, command_box, fill, script_data, text_cell
from .report_table import human_bytes, human_seconds, human_width, report_method
from .spectrum import Spectrum

_RUN_HEADINGS = (
    "run",
    "method",
    "bits",
    "size",
    "adapter",
    "plain error",
    "error",
    "change",
    "output error",
    "time",
)
_COLORS = 8  # of the template's palette


def _row(cells: Iterable[tuple[str, float | None]]) -> str:
    """A table row of texts and the values that they sort by."""
    return f"<tr>{''.join(cell(text, value) for text, value in cells)}</tr>"


def _headings(names: Iterable[str]) -> str:
    return "".join(f"<th>{escape(name)}</th>" for name in names)


def _error(value: float | None) -> tuple[str, float | None]:
    return ("", float("inf")) if value is None else (f"{value:.4f}", value)


def _run_row(run: Run) -> str:
    report, totals = run.report, run.report.totals
    before, after = totals["error_plain_mean"], totals["error_mean"]
    change = after / before - 1 if before else 0.0
    adapted = any(layer.rank for layer in report.layers)
    return _row(
        [
            (run.label, None),
            (report_method(report) if adapted else "no adapter", None),
            (f"{totals['bits_per_weight']:.3f}", totals["bits_per_weight"]),
            (human_bytes(report.bytes_out), report.bytes_out),
            (human_bytes(report.adapter_bytes), report.adapter_bytes),
            _error(before),
            _error(after),
            (f"{100 * change:+.1f} %", change),
            _error(totals.get("output_error_mean")),
            (human_seconds(report.seconds), report.seconds),
        ]
    )


def _worst_row(run: Run, layer: LayerReport) -> str:
    cells = [
        cell(run.label),
        cell(layer.name),
        cell(human_width(layer)),
        cell(str(layer.rank or "-"), layer.rank),
        cell(f"{layer.error:.4f}", layer.error),
        text_cell(why(layer, run.report.layers)),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _layer_rows(runs: Sequence[Run]) -> str:
    found = [{layer.name: layer for layer in run.report.layers} for run in runs]
    rows = []
    for name in dict.fromkeys(name for by_name in found for name in by_name):
        layers = [by_name.get(name) for by_name in found]
        first = next(layer for layer in layers if layer is not None)
        cells: list[tuple[str, float | None]] = [
            (name, None),
            (" x ".join(map(str, first.shape)), first.numel),
            (", ".join(dict.fromkeys(human_width(layer) for layer in layers if layer)), None),
        ]
        rows.append(_row(cells + [_error(layer.error if layer else None) for layer in layers]))
    return "\n".join(rows)


def _legend(runs: Sequence[Run], *, solved: bool = False) -> str:
    """The runs' colours; ``solved``: only of runs that have iterations."""
    return "".join(
        f'<span class="item"><span class="key" style="background:var(--run-{i % _COLORS})"></span>'
        f"{escape(run.label)}</span>"
        for i, run in enumerate(runs)
        if not solved or any(len(layer.trace) > 1 for layer in run.report.layers)
    )


def _drawn(run: Run) -> dict[str, Any]:
    report = run.report
    return {
        "label": run.label,
        "error": report.totals["error_mean"],
        "bytes": report.bytes_out + report.adapter_bytes,
        "adapted": any(layer.rank for layer in report.layers),
        "kinds": [asdict(group) for group in groups(report.layers)],
        "layers": [
            {
                "name": layer.name,
                "error": layer.error,
                "bits": layer.bits_per_weight,
                "trace": list(layer.trace),
            }
            for layer in report.layers
        ],
    }


def render(runs: Sequence[Run], *, command: str, worst: int, spectra: Sequence[Spectrum] = ()) -> str:
    """The page. Everything that comes from a model or the user is escaped."""
    worst_rows = [_worst_row(run, layer) for run in runs for layer in run.report.worst(worst)]
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in run.report.versions.items()) for run in runs
    )
    labels = [run.label for run in runs]
    return fill(
        "compare.html",
        title=escape(labels[0] if len(runs) == 1 else f"{len(runs)} runs of {runs[0].report.model} compared"),
        command=command_box(command),
        run_headings=_headings(_RUN_HEADINGS),
        run_rows="\n".join(map(_run_row, runs)),
        legend=_legend(runs),
        solved_legend=_legend(runs, solved=True),
        worst_rows="\n".join(worst_rows),
        layer_headings=_headings(["layer", "shape", "format", *labels]),
        layer_rows=_layer_rows(runs),
        versions=escape("; ".join(versions)),
        data=script_data(
            {"runs": [_drawn(run) for run in runs], "spectra": [spectrum.to_json() for spectrum in spectra]}
        ),
    )
