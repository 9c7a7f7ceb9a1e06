"""The report as one self-contained HTML page: no network, light and dark, sortable."""

from __future__ import annotations

import json
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from .files import write_text
from .report import LayerReport, RunReport
from .report_table import facts, human_bytes, human_width, report_method

HTML_FILE = "report.html"
_HEADINGS = ("layer", "shape", "format", "bits", "rank", "plain error", "error", "change", "seconds", "bytes")


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
    """A table cell, with the value that its column sorts by."""
    data = "" if value is None else f' data-value="{value!r}"'
    return f"<td{data}>{escape(text)}</td>"


def _row(layer: LayerReport) -> str:
    cells = [
        cell(layer.name),
        cell(" x ".join(map(str, layer.shape)), layer.numel),
        cell(human_width(layer)),
        cell(f"{layer.bits_per_weight:.3f}", layer.bits_per_weight),
        cell(str(layer.rank or "-"), layer.rank),
        cell(f"{layer.error_plain:.4f}", layer.error_plain),
        cell(f"{layer.error:.4f}", layer.error),
        cell(f"{-100 * layer.gain:+.1f} %", -layer.gain),
        cell(f"{layer.seconds:.2f}", layer.seconds),
        cell(human_bytes(layer.bytes_out), layer.bytes_out),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def render(report: RunReport) -> str:
    """The page. Everything that comes from the model or the user is escaped."""
    wanted = ("name", "error_plain", "error", "trace")
    drawn = [{name: getattr(layer, name) for name in wanted} for layer in report.layers]
    notes = ""
    if report.notes:
        notes = f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in report.notes)}</ul>"
    return fill(
        "report.html",
        title=escape(f"{report.model}: {report_method(report)}"),
        subtitle=escape("; ".join(f"{label} {text}" for label, text in facts(report))),
        cards=_cards(report),
        command=command_box(report.command),
        notes=notes,
        headings="".join(f"<th>{heading}</th>" for heading in _HEADINGS),
        rows="\n".join(map(_row, report.layers)),
        versions=escape(", ".join(f"{name} {version}" for name, version in report.versions.items())),
        data=script_data({"layers": drawn}),
    )


def write_html(report: RunReport, folder: Path) -> None:
    """Write ``report.html`` into ``folder``, atomically."""
    write_text(folder / HTML_FILE, render(report))
