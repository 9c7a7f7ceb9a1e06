"""``qlora-report RUN...``: what runs cost and gained, side by side, as tables, a page, plots, CSV or JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click
from rich.text import Text

from qlora_engine.cli import common
from qlora_engine.errors import InputError
from qlora_engine.report import LayerReport

PROGRAM = "qlora-report"
EXAMPLES = """
\b
Examples:
  qlora-report out
  qlora-report out-nf4 out-nf3 --baseline --html compare.html
  qlora-report out --spectrum ./model --html out.html
"""


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo(f"{PROGRAM} {common.package_version()}")
        context.exit()


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXAMPLES,
    help="Compare RUNs: folders that loftq-init wrote, or their report.json. Shows what each cost and "
    "gained, the error by kind of module, and the worst layers with what sets them apart.",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=common.UserPath())
@click.option("--baseline", is_flag=True, help="Put plain quantisation to the same formats first.")
@click.option("--worst", default=5, metavar="N", help="Worst layers to explain, for each run. [5]")
@click.option("--html", type=common.UserPath(), metavar="FILE", help="Write one self-contained page.")
@click.option("--png", type=common.UserPath(), metavar="DIR", help="Write plots (needs matplotlib).")
@click.option("--csv", "csv_file", type=common.UserPath(), metavar="FILE", help="Write every layer.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option(
    "--spectrum",
    type=common.UserPath(),
    metavar="MODEL",
    help="The original checkpoint: singular values of what is missing, for the 4 worst layers of each run.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version.",
)
def command(
    runs: tuple[Path, ...],
    baseline: bool,
    worst: int,
    html: Path | None,
    png: Path | None,
    csv_file: Path | None,
    as_json: bool,
    quiet: bool,
    spectrum: Path | None,
) -> int:
    """The command's body; see ``--help``."""
    from qlora_engine.compare import plain, read_runs
    from qlora_engine.compare_table import comparison
    from qlora_engine.files import write_text
    from qlora_engine.report import dumps

    if worst < 1:
        raise InputError(f"--worst {worst}; it must be at least 1")
    html, csv_file = _targets(runs, html, csv_file)
    found = read_runs(runs)
    spectra = []
    if spectrum is not None:
        from qlora_engine.spectrum import spectra as read_spectra

        for path, run in zip(runs, found, strict=True):
            if not path.is_dir():
                raise InputError(f"--spectrum needs the folder of the run, not {path}")
            names = [layer.name for layer in run.report.worst(4)]
            spectra += read_spectra(spectrum, path, names, label=run.label)
    if baseline:
        baselines = {run.label: run for run in map(plain, found)}
        found = [*baselines.values(), *found]
    if html is not None:
        from qlora_engine.compare_html import render

        line = shlex.join([PROGRAM, *sys.argv[1:]])
        write_text(html, render(found, command=line, worst=worst, spectra=spectra))
    if png is not None:
        from qlora_engine.report_png import write_png

        write_png(found, png, spectra)
    if csv_file is not None:
        write_text(
            csv_file, _csv([(run.label, layer.to_json()) for run in found for layer in run.report.layers])
        )
    if as_json and not quiet:
        values = {"runs": [{"label": run.label, **run.report.to_json()} for run in found]}
        print(dumps(values | {"spectra": [one.to_json() for one in spectra]}))
        return 0
    screen = common.console(sys.stdout, quiet=quiet)
    screen.print(comparison(found, worst=worst, spectra=spectra))
    for target in (html, png, csv_file):
        if target is not None:
            screen.print(Text(f"Wrote {target}"), soft_wrap=True)
    return 0


def _targets(
    runs: Sequence[Path], html: Path | None, csv_file: Path | None
) -> tuple[Path | None, Path | None]:
    """Where the page and the table go, refused where they would take the place of something else."""
    from qlora_engine.files import file_to_write

    files = {option: path for option, path in (("--html", html), ("--csv", csv_file)) if path is not None}
    real = {option: file_to_write(option, path) for option, path in files.items()}
    for option, path in real.items():
        if path.suffix in (".json", ".safetensors") and path.parent in {run.resolve() for run in runs}:
            raise InputError(f"{option} {files[option]} is a file of the run; give another name")
    if len(set(real.values())) < len(real):
        raise InputError(f"--html and --csv both name {html}; give two files")
    return real.get("--html"), real.get("--csv")


def _csv(rows: list[tuple[str, dict[str, object]]]) -> str:
    """One line a layer; the trace as one field, its values separated by spaces."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *(field.name for field in dataclasses.fields(LayerReport))])
    for label, values in rows:
        cells = [" ".join(map(str, v)) if isinstance(v, list) else v for v in values.values()]
        writer.writerow([label, *cells])
    return text.getvalue()


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of the console script."""
    common.run_command(PROGRAM, command, arguments)


if __name__ == "__main__":
    main()
