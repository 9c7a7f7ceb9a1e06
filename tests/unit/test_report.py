"""Sums, means and JSON of a report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_engine.errors import InputError
from qlora_engine.report import REPORT_FILE, LayerReport, RunReport, geometric_mean, total_error
from qlora_engine.report_html import HTML_FILE, render, write_html
from qlora_engine.report_table import human_bytes, human_seconds


def layer(name: str = "model.layers.0.q", **values: Any) -> LayerReport:
    known = {
        "name": name,
        "kind": "linear",
        "shape": (4, 8),
        "format": "nf4",
        "block_size": 64,
        "double_quant": False,
        "rank": 2,
        "scaling": 1.0,
        "bits_per_weight": 4.5,
        "weight_norm": 2.0,
        "error_plain": 0.1,
        "error": 0.05,
        "trace": (0.1, 0.06, 0.05),
        "best": 2,
        "iterations": 2,
        "seconds": 1.5,
        "bytes_in": 64,
        "bytes_out": 18,
    }
    return LayerReport(**{**known, **values})


def run(*layers: LayerReport, **values: Any) -> RunReport:
    known = {
        "model": "some/model",
        "command": "loftq-init some/model out",
        "run": {"options": {"method": "loftq"}},
        "save_format": "bnb",
        "dtype": "float16",
        "layers": layers or (layer(),),
        "bytes_in": 100,
        "bytes_out": 40,
    }
    return RunReport(**{**known, **values})


def test_json_round_trip(tmp_path: Path) -> None:
    report = run(layer(), layer("x", output_error_plain=0.3, output_error=0.2), notes=("a note",))
    assert RunReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    report.write(tmp_path)
    assert RunReport.read(tmp_path) == report
    assert json.loads((tmp_path / REPORT_FILE).read_text())["totals"] == report.totals


@pytest.mark.parametrize(
    "values", [{}, {"version": 9}, {"version": 1}, {"version": 1, "layers": [{"name": "x"}]}]
)
def test_from_json_refuses(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        RunReport.from_json(values)


def test_read_refuses_a_folder_without(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no report\.json"):
        RunReport.read(tmp_path)


def test_totals_are_those_of_the_weights() -> None:
    torch.manual_seed(0)
    W = [torch.randn(4, 8), 3 * torch.randn(16, 8)]
    E = [0.1 * torch.randn(4, 8), 0.2 * torch.randn(16, 8)]
    layers = [
        layer(
            str(i),
            shape=tuple(w.shape),
            weight_norm=float(w.norm()),
            error=float(e.norm() / w.norm()),
            error_plain=2 * float(e.norm() / w.norm()),
            bits_per_weight=4.0 + i,
        )
        for i, (w, e) in enumerate(zip(W, E, strict=True))
    ]
    totals = run(*layers).totals
    whole = torch.cat([w.flatten() for w in W]).norm()
    assert totals["error_total"] == pytest.approx(
        float(torch.cat([e.flatten() for e in E]).norm() / whole), rel=1e-6
    )
    assert totals["error_plain_total"] == pytest.approx(2 * totals["error_total"])
    assert totals["error_mean"] == pytest.approx(math.sqrt(layers[0].error * layers[1].error))
    assert totals["bits_per_weight"] == pytest.approx((32 * 4 + 128 * 5) / 160)
    assert totals["weights"] == 160
    assert "output_error_mean" not in totals


def test_output_errors_where_there_are_any() -> None:
    layers = [layer(), layer("b", output_error_plain=0.4, output_error=0.1)]
    layers.append(layer("c", output_error_plain=0.1, output_error=0.1))
    totals = run(*layers).totals
    assert totals["output_error_plain_mean"] == pytest.approx(0.2)
    assert totals["output_error_mean"] == pytest.approx(0.1)


def test_means_of_odd_values() -> None:
    assert math.isnan(geometric_mean([]))
    assert geometric_mean([0.0, 1.0]) == 0.0
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert total_error([], []) == 0.0
    assert total_error([layer(weight_norm=0.0)], [0.5]) == 0.0
    assert layer(error_plain=0.0, error=0.0).gain == 0.0


def test_worst_first() -> None:
    report = run(*(layer(str(i), error=0.01 * i) for i in range(9)))
    assert [found.name for found in report.worst(3)] == ["8", "7", "6"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (268_997_000, "269 MB"), (1.2e13, "12 TB")],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (245, "4 min 05 s"), (7380, "2 h 03 min")]
)
def test_human_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_html_is_self_contained_and_escaped(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    report = run(layer(evil), model=evil, command=f"loftq-init '{evil}'", notes=(evil,))
    write_html(report, tmp_path)
    page = (tmp_path / HTML_FILE).read_text()
    assert page == render(report)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "$" not in page.replace("${", "").replace("$$", "").split("<script>")[0]
    for foreign in ("http://", "https://", "src=", "@import", "url("):
        assert foreign not in page.replace("http://www.w3.org/2000/svg", "")
    assert "50.0 %" in page


def test_html_of_layers_without_a_trace() -> None:
    assert "model.layers.0.q" in render(run(layer(trace=(), iterations=0, rank=0)))
