"""Writes RESULTS.md from the measurements in results/, so that no number in it was typed by hand.

python -m benchmarks.error_report --suite layers --json benchmarks/results/layers.json
python -m benchmarks.results
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, table

STORED = ROOT / "benchmarks" / "results"
PAGE = ROOT / "benchmarks" / "RESULTS.md"
HEAD = """# Results

Every table is what one command measured, peers in the same run; `python -m benchmarks.results` writes this
page from the files in [results](results). Errors hold for any machine up to rounding; times hold only beside
the others of their table. SmolLM2 is the dequantised Q4_1 model that a package carries, so its weights lie on
a 4-bit grid: all-MiniLM-L6-v2 is the unbiased source for weight and layer errors.
"""


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    for path in sorted(STORED.glob("*.json")):
        parts.append(_section(path))
    return "\n".join(parts)


def _section(path: Path) -> str:
    stored = json.loads(path.read_text())
    environment: dict[str, Any] = stored["environment"]
    versions = [f"{name} {environment[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes")]
    machine = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads"
    commit = f"commit {environment['commit']}" + (
        " with changes" if environment["uncommitted_changes"] else ""
    )
    title = path.stem.replace("-", " ")
    about = ", ".join([environment["date"], machine, *versions, commit])
    rows = [{key: value for key, value in row.items() if value is not None} for row in stored["rows"]]
    about += "".join(f"\n\n{note}" for note in stored.get("notes", []))
    return f"## {title[:1].upper()}{title[1:]}\n\n`{_command(stored)}`\n\n{about}\n\n{table(rows)}\n"


def _command(stored: dict[str, Any]) -> str:
    command = stored["command"]
    return command if isinstance(command, str) else " ".join(command)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    PAGE.write_text(render())


if __name__ == "__main__":
    main()
