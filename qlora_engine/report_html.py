"""The report as one self-contained HTML page: no network, light and dark, sortable."""

from __future__ import annotations

import json
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from .compare import why
from .files import write_text
from .report import LayerReport, RunReport
from .report_table import human_bytes, human_seconds, human_width, report_method

HTML_FILE = "report.html"
_HEADINGS = ("layer", "plain error", "error", "change", "format", "bits", "rank", "shape", "seconds", "bytes")
_OUTPUT_HEADINGS = ("output plain", "output error")
_WORST = 5


def fill(template: str, **values: str) -> str:
    """A page of the templates folder with its values, the shared style and the shared plots put in."""
    folder = resources.files("qlora_engine").joinpath("templates")
    page, style, plot = (
        folder.joinpath(name).read_text(encoding="utf-8") for name in (template, "style.css", "plot.js")
    )
    return Template(page).substitute(values, style=style, plot=plot)


def script_data(values: Any) -> str:
    """JSON for a script element, which no text inside it can end."""
    return json.dumps(values).replace("<", "\\u003c")


def command_box(command: str) -> str:
    """The command line that made the page, with a button that copies it; nothing for an empty one."""
    if not command:
        return ""
    return (
        f'<div class="command"><code id="command">{escape(command)}</code>'
        '<button id="copy" type="button">copy</button></div>'
    )


def _card(value: str, label: str) -> str:
    return f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def _cards(report: RunReport) -> str:
    totals = report.totals
    before, after = totals["error_plain_mean"], totals["error_mean"]
    cards = [
        (f"{after:.4f}", f"relative weight error, mean ({before:.4f} plain)"),
        (f"{100 * (1 - after / before):.1f} %" if before else "0 %", "of the error gone"),
        (human_bytes(report.bytes_out), f"of weights, from {human_bytes(report.bytes_in)}"),
        (f"{totals['bits_per_weight']:.3f}", "bits a quantised weight"),
        (human_bytes(report.adapter_bytes), "of adapter"),
        (f"{totals['solve_seconds']:.1f} s", f"solving on {report.device}"),
    ]
    if "output_error_mean" in totals:
        plain = totals["output_error_plain_mean"]
        label = f"relative output error, mean ({plain:.4f} plain)"
        cards.insert(2, (f"{totals['output_error_mean']:.4f}", label))
    return "".join(_card(*card) for card in cards)


def cell(text: str, value: float | None = None) -> str:
    """A table cell, with the value that its column sorts by; a name may be broken after its dots."""
    data = "" if value is None else f' data-value="{value!r}"'
    return f"<td{data}>{escape(text).replace('.', '.<wbr>') if value is None else escape(text)}</td>"


def text_cell(text: str) -> str:
    """A table cell of running text."""
    return f'<td class="text">{escape(text)}</td>'


def _row(layer: LayerReport, *, outputs: bool) -> str:
    cells = [
        cell(layer.name),
        cell(f"{layer.error_plain:.4f}", layer.error_plain),
        cell(f"{layer.error:.4f}", layer.error),
        cell(f"{-100 * layer.gain:+.1f} %", -layer.gain),
        cell(human_width(layer)),
        cell(f"{layer.bits_per_weight:.3f}", layer.bits_per_weight),
        cell(str(layer.rank or "-"), layer.rank),
        cell(" x ".join(map(str, layer.shape)), layer.numel),
        cell(f"{layer.seconds:.2f}", layer.seconds),
        cell(human_bytes(layer.bytes_out), layer.bytes_out),
    ]
    if outputs:
        pair = layer.output_error_plain, layer.output_error
        cells[4:4] = [cell("", float("inf")) if e is None else cell(f"{e:.4f}", e) for e in pair]
    return f"<tr>{''.join(cells)}</tr>"


def _worst_row(layer: LayerReport, report: RunReport) -> str:
    cells = [
        cell(layer.name),
        cell(human_width(layer)),
        cell(str(layer.rank or "-"), layer.rank),
        cell(f"{layer.error:.4f}", layer.error),
        text_cell(why(layer, report.layers)),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _subtitle(report: RunReport) -> str:
    """What the cards leave out."""
    totals = report.totals
    return (
        f"{totals['weights']:,} weights in {totals['layers']} layers, saved as {report.save_format}, "
        f"{report.dtype}, in {human_seconds(report.seconds)} with at most {human_bytes(report.peak_rss)} of "
        "memory"
    )


def render(report: RunReport) -> str:
    """The page. Everything that comes from the model or the user is escaped."""
    wanted = {name: name for name in ("name", "error_plain", "error", "output_error", "format", "trace")}
    wanted["bits"] = "bits_per_weight"
    drawn = [{key: getattr(layer, name) for key, name in wanted.items()} for layer in report.layers]
    outputs = any(layer.output_error is not None for layer in report.layers)
    headings = [*_HEADINGS[:4], *(_OUTPUT_HEADINGS if outputs else ()), *_HEADINGS[4:]]
    notes = ""
    if report.notes:
        notes = f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in report.notes)}</ul>"
    return fill(
        "report.html",
        title=escape(f"{report.model}: {report_method(report)}"),
        subtitle=escape(_subtitle(report)),
        cards=_cards(report),
        command=command_box(report.command),
        notes=notes,
        worst_rows="\n".join(_worst_row(layer, report) for layer in report.worst(_WORST)),
        headings="".join(f"<th>{heading}</th>" for heading in headings),
        rows="\n".join(_row(layer, outputs=outputs) for layer in report.layers),
        versions=escape(", ".join(f"{name} {version}" for name, version in report.versions.items())),
        data=script_data({"layers": drawn}),
    )


def write_html(report: RunReport, folder: Path) -> None:
    """Write ``report.html`` into ``folder``, atomically."""
    write_text(folder / HTML_FILE, render(report))
