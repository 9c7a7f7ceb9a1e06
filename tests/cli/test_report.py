"""qlora-report: tables, page, plots, CSV and JSON over real runs of loftq-init on tiny models."""

from __future__ import annotations

import contextlib
import csv
import html
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_engine.report import RunReport
from qlora_engine.spectrum import spectra
from tests.cli.command import Result
from tests.cli.command import invoke as loftq_init


def invoke(*arguments: object) -> Result:
    """``qlora-report`` in this process."""
    from qlora_engine.cli import report

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        report.main([str(argument) for argument in arguments])
    return Result(int(ended.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> list[Path]:
    """A 4-bit and a mixed 2- and 3-bit run of the same model."""
    home = tmp_path_factory.mktemp("runs")
    model = make_checkpoint("llama")
    for name, options in (("four", []), ("mixed", ["--bits", "3", "--bits-pattern", "down_proj=2"])):
        assert loftq_init(model, home / name, "--rank", "4", "--quiet", *options).code == 0
    return [home / "four", home / "mixed"]


def test_tables_show_runs_kinds_and_reasons(runs: list[Path]) -> None:
    result = invoke(*runs, "--baseline", "--worst", "2")
    assert result.code == 0
    four = RunReport.read(runs[0]).totals
    line = next(line for line in result.out.splitlines() if line.startswith("four "))
    assert f"{four['error_plain_mean']:.4f}" in line
    assert f"{four['error_mean']:.4f}" in line
    assert "plain nf4" in result.out
    assert "plain nf2, nf3" in result.out
    assert re.search(r"self_attn\.q_proj +2 ", result.out)
    assert "Worst of mixed" in result.out
    assert "bits where the median is" in result.out.replace("\n", " ")


def test_page_is_self_contained_and_escaped(runs: list[Path], tmp_path: Path) -> None:
    hostile = "</script><b>&"
    strange = json.loads((runs[0] / "report.json").read_text())
    strange["layers"][0]["name"] = hostile
    (tmp_path / "report.json").write_text(json.dumps(strange))
    page = tmp_path / "page.html"
    assert invoke(tmp_path / "report.json", runs[1], "--html", page).code == 0
    text = page.read_text()
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)", text)
    assert hostile not in text
    assert html.escape(hostile) in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert [len(run["layers"]) for run in data["runs"]] == [14, 14]
    assert data["runs"][1]["error"] == RunReport.read(runs[1]).totals["error_mean"]


def test_csv_and_json_hold_every_layer(runs: list[Path], tmp_path: Path) -> None:
    result = invoke(*runs, "--json", "--csv", tmp_path / "layers.csv")
    values = json.loads(result.out)
    assert [run["label"] for run in values["runs"]] == ["four", "mixed"]
    rows = list(csv.DictReader((tmp_path / "layers.csv").open()))
    assert len(rows) == 28
    for row, layer in zip(rows, values["runs"][0]["layers"] + values["runs"][1]["layers"], strict=True):
        assert row["name"] == layer["name"]
        assert float(row["error"]) == layer["error"]


def test_png_draws_each_plot(runs: list[Path], make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = invoke(*runs, "--png", tmp_path / "plots", "--spectrum", make_checkpoint("llama"))
    assert result.code == 0
    for name in ("size_error.png", "kinds.png", "iterations.png", "spectra.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_spectra_are_told_in_the_terminal(runs: list[Path], make_checkpoint: Callable[..., Path]) -> None:
    result = invoke(runs[0], "--spectrum", make_checkpoint("llama"), "--worst", "1")
    name = RunReport.read(runs[0]).worst(1)[0].name
    (line,) = [line for line in result.out.splitlines() if line.startswith(f"four {name}")]
    largest = [float(word) for word in line.split()[2:4]]
    shares = [float(word) for word in line.split()[4:] if word != "%"]
    assert largest[0] > largest[1]  # the adapter took the largest away
    assert all(0 < share < 100 for share in shares)


def test_quiet_prints_nothing(runs: list[Path], tmp_path: Path) -> None:
    result = invoke(*runs, "--quiet", "--html", tmp_path / "page.html")
    assert (result.code, result.out, result.err) == (0, "", "")
    assert (tmp_path / "page.html").is_file()


@pytest.mark.parametrize("number", [0, 1])  # bitsandbytes' layout and the native one
def test_spectra_agree_with_the_report(
    runs: list[Path], make_checkpoint: Callable[..., Path], number: int
) -> None:
    """The squares of the singular values sum to the squared relative error that the solver reported."""
    report = RunReport.read(runs[number])
    names = [layer.name for layer in report.layers[:7]]
    for layer, found in zip(report.layers, spectra(make_checkpoint("llama"), runs[number], names)):
        before, after = torch.tensor(found.before).norm(), torch.tensor(found.after).norm()
        assert float(before) == pytest.approx(layer.error_plain, rel=1e-4)
        assert float(after) == pytest.approx(layer.error, rel=1e-4)
        assert found.before[0] > found.after[0]


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_spectra_of_transposed_layers_and_other_models(
    name: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_checkpoint(name)
    assert loftq_init(model, tmp_path / "out", "--rank", "4", "--quiet").code == 0
    layer = RunReport.read(tmp_path / "out").layers[0]
    (found,) = spectra(model, tmp_path / "out", [layer.name])
    assert float(torch.tensor(found.after).norm()) == pytest.approx(layer.error, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such folder or report: nowhere"),
        (["."], "has no report.json"),
        (["RUN", "--worst", "0"], "--worst 0; it must be at least 1"),
        (["RUN", "--spectrum", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, runs: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*[runs[0] if argument == "RUN" else argument for argument in arguments])
    assert result.code == 2
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("qlora-report: error: ")
    assert message in line


PROBE = """<script>
  const press = (column) => document.querySelectorAll("#layers th")[column].click();
  const first = (column) => document.querySelector("#layers tbody tr").cells[column].dataset.value;
  press(COLUMN); const low = first(COLUMN); press(COLUMN); const high = first(COLUMN);
  const plots = [...document.querySelectorAll("svg")].map(svg => svg.childElementCount);
  const filter = document.getElementById("filter");
  filter.value = "Q_PROJ"; filter.dispatchEvent(new Event("input"));
  const kept = [...document.querySelectorAll("#layers tbody tr:not([hidden])")].length;
  const page = document.documentElement, spill = page.scrollWidth - page.clientWidth;
  const outside = [...document.querySelectorAll("svg text")].filter(text => {
    const box = text.getBoundingClientRect(), plot = text.ownerSVGElement.getBoundingClientRect();
    return box.left < plot.left - 1 || box.right > plot.right + 1;
  }).map(text => text.textContent);
  const numbers = {low: Number(low), high: Number(high), plots, kept, spill, width: innerWidth};
  parent.postMessage(JSON.stringify({...numbers, outside, errors: failures}), "*");
</script></body>"""  # fmt: skip
CATCH = """<head><script>
  window.failures = []; onerror = (m) => { failures.push(m); };
  console.error = console.warn = (m) => { failures.push(String(m)); };
</script>"""
# A window of the browser is at least 500 pixels wide; a frame in it may be as narrow as a phone.
FRAME = """<!doctype html>
<script>addEventListener("message", event => { document.title = event.data; });</script>
<iframe src="FILE" style="border:0;width:WIDTHpx;height:900px"></iframe>"""


def look_at(page: Path, width: int, column: int, profile: Path) -> dict[str, Any]:
    """What a script finds on a page in a real browser: drawn plots, sorting, filtering, errors, overflow."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine")
    head, _, tail = page.read_text().replace("<head>", CATCH, 1).rpartition("</body>")
    probe = profile.with_suffix(".html")
    probe.write_text(head + PROBE.replace("COLUMN", str(column)) + tail)
    frame = profile.with_suffix(".frame.html")
    frame.write_text(FRAME.replace("FILE", probe.name).replace("WIDTH", str(width)))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={profile}", "--window-size=1500,1000", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [browser, *flags, "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found is not None, done.stderr
    values: dict[str, Any] = json.loads(html.unescape(found[1]))
    return values


@pytest.mark.parametrize("width", [1400, 390])
def test_pages_work_in_a_browser(
    runs: list[Path], make_checkpoint: Callable[..., Path], tmp_path: Path, width: int
) -> None:
    """Plots are drawn, no error reaches the console, headings sort, the filter filters, nothing spills."""
    compared = tmp_path / "compare.html"
    invoke(*runs, "--baseline", "--html", compared, "--spectrum", make_checkpoint("llama"))
    # sizes, kinds, iterations, 4 maps of the error, 1 of the bits, 8 spectra; of one run: layers, map, trace
    for page, column, plots in ((runs[0] / "report.html", 2, 3), (compared, 3, 16)):
        found = look_at(page, width, column, tmp_path / f"profile-{page.stem}")
        assert found["errors"] == []
        assert found["width"] == width
        assert 0 < found["low"] < found["high"] < 1
        assert len(found["plots"]) == plots
        assert all(count > 3 for count in found["plots"])
        assert found["kept"] == 2
        assert found["spill"] <= 0
        assert found["outside"] == []


def _in(folder: Path, make: Callable[[Path], None]) -> Path:
    path = folder / "page"
    make(path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.mkdir(), "is a folder; give the name of a file"),
        (os.mkfifo, "is a device or a pipe; give the name of an ordinary file"),
        (lambda p: p.symlink_to(p.parent / "no" / "where"), "there is no folder"),
    ],
)
def test_a_file_that_cannot_be_written(
    make: Callable[[Path], None], message: str, runs: list[Path], tmp_path: Path
) -> None:
    """A device as target was replaced by the page. (A pipe stands for it: no test may risk /dev/null.)"""
    path = _in(tmp_path, make)
    before = path.lstat()
    for option in ("--html", "--csv"):
        result = invoke(runs[0], option, path)
        assert result.code == 2
        assert result.err.startswith(f"qlora-report: error: {option} {path}")
        assert message in result.err
        assert path.lstat() == before
        assert [file.name for file in tmp_path.iterdir()] == ["page"]


def test_a_link_is_written_through(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "page").symlink_to("kept/page.html")
    assert invoke(runs[0], "--html", tmp_path / "page").code == 0
    assert (tmp_path / "page").is_symlink()
    assert (tmp_path / "kept" / "page.html").read_text().startswith("<!doctype html>")


def test_files_of_the_run_are_no_targets(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    before = (run / "report.json").read_bytes()
    for name in ("report.json", "model.safetensors"):
        result = invoke(run, "--html", run / name)
        assert (result.code, "is a file of the run; give another name" in result.err) == (2, True)
    assert (run / "report.json").read_bytes() == before
    both = invoke(run, "--html", tmp_path / "x", "--csv", tmp_path / "kept" / ".." / "x")
    assert (both.code, "give two files" in both.err) == (2, True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("values", [{"shape": [0, 4]}, {"shape": []}, {"rank": -1}])
def test_a_layer_that_cannot_be(values: dict[str, Any], runs: list[Path], tmp_path: Path) -> None:
    report = json.loads((runs[0] / "report.json").read_text())
    report["layers"][0].update(values)
    (tmp_path / "report.json").write_text(json.dumps(report))
    result = invoke(tmp_path)
    assert (result.code, "not a layer's report: shape (" in result.err) == (2, True)
