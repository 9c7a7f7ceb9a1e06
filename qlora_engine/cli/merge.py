"""``qlora-merge BASE ADAPTER OUT``: write the base with the adapter in it as a model of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from qlora_engine.cli import common

PROGRAM = "qlora-merge"
EXAMPLES = """
\b
Examples:
  qlora-merge out out/loftq_init merged
  qlora-merge meta-llama/Llama-3.2-1B ./my-adapter merged --dtype bfloat16
  qlora-merge ./model ./my-adapter merged --requantize nf4
"""


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo(f"{PROGRAM} {common.package_version()}")
        context.exit()


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Every option of the command, in the order of its help."""
    text = {"metavar": "TEXT"}
    number = {"type": int, "metavar": "N"}
    flag = {"is_flag": True}
    version = {**flag, "is_eager": True, "expose_value": False, "callback": _show_version}
    options: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        (
            ("--dtype",),
            {**text, "default": "auto", "help": "float16, bfloat16 or float32. [as the base]"},
        ),
        (
            ("--requantize",),
            {**text, "help": "Quantise the merged layers again: nf4, int8, ... [dense]"},
        ),
        (("--block-size",), {**number, "default": 64, "help": "Weights that share a scale. [64]"}),
        (("--double-quant/--no-double-quant",), {"default": False, "help": "Quantise the scales, too. [no]"}),
        (("--safe",), {**flag, "help": "Refuse a result that is not finite."}),
        (("--max-shard-size",), {**text, "default": "5GB", "help": "Largest weight file. [5GB]"}),
        (("--revision",), {**text, "help": "Branch, tag or commit of a hub BASE."}),
        (("--trust-remote-code",), {**flag, "help": "Let Python files that come with BASE run."}),
        (("--dry-run",), {**flag, "help": "Show what would be merged. Writes nothing."}),
        (("--overwrite",), {**flag, "help": "Replace OUT, once the new one is whole; begin anew."}),
        (("--resume",), {**flag, "help": "Go on with an interrupted run; finished files are kept."}),
        (("--quiet",), {**flag, "help": "Print nothing but errors."}),
        (("--json", "as_json"), {**flag, "help": "Print JSON lines: plan, one a merged weight, totals."}),
        (("--version",), {**version, "help": "Show the version."}),
    ]
    for names, settings in reversed(options):
        function = click.option(*names, **settings)(function)
    return function


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXAMPLES,
    help="Merge ADAPTER (a folder that PEFT or this program wrote, or a hub id) into BASE (dense, "
    "bitsandbytes, or written by loftq-init; a folder or a hub id) and write OUT: a dense model that plain "
    "transformers loads. One weight is in memory at a time. OUT appears only when it is whole.",
)
@click.argument("base")
@click.argument("adapter")
@click.argument("out", type=common.UserPath())
@_options
def command(base: str, adapter: str, out: Path, **given: Any) -> int:
    """The command's body; see ``--help``."""
    from qlora_engine.cli import merge_run

    return merge_run.execute(base, adapter, out, given)


def _hint() -> str:
    from qlora_engine.cli import merge_run

    return merge_run.how_to_go_on()


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of the console script."""
    common.run_command(PROGRAM, command, arguments, hint=_hint)


if __name__ == "__main__":
    main()
