"""``loftq-init MODEL OUT``: quantise a checkpoint and solve for the LoRA factors that correct it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from qlora_engine.cli import common

PROGRAM = "loftq-init"
EXAMPLES = """
\b
Examples:
  loftq-init meta-llama/Llama-3.2-1B out --rank 32
  loftq-init ./model out --bits 3 --scales signed-mse --exclude-modules down_proj
  loftq-init ./model out --bits-pattern 'mlp\\..*=3' --bits-pattern 'v_proj=8'
  loftq-init ./model out --bits 3 --calibration texts.jsonl
  loftq-init ./model out --budget 2.75 --rank 32 --calibration texts.jsonl
  loftq-init ./model out --config recipe.toml --dry-run
"""


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo(f"{PROGRAM} {common.package_version()}")
        context.exit()


def _use_recipe(context: click.Context, _: click.Parameter, value: str | None) -> str | None:
    if value is not None and not context.resilient_parsing:
        recipe = common.recipe_defaults(common.read_recipe(Path(value)), context.command)
        context.default_map = {**(context.default_map or {}), **recipe}
    return value


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Every option of the command, in the order of its help."""
    text = {"metavar": "TEXT"}
    number = {"type": int, "metavar": "N"}
    pairs = {"multiple": True, "metavar": "REGEX=VALUE"}
    flag = {"is_flag": True}
    options: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        (
            ("--bits",),
            {**number, "help": "Bits a weight: 4 (nf4, the default), 3 (nf3), 2 (nf2) or 8 (int8)."},
        ),
        (("--format",), {**text, "help": "A format by name instead: nf4, fp4, int4, uint4, nf3, ..."}),
        (("--block-size",), {**number, "default": 64, "help": "Weights that share a scale. [64]"}),
        (
            ("--double-quant/--no-double-quant",),
            {"default": False, "help": "Quantise the scales, too (4.13 bits instead of 4.5). [no]"},
        ),
        (
            ("--bits-pattern",),
            {**pairs, "help": "Other bits, format, or FORMAT/BLOCK for the modules that a regex matches."},
        ),
        (
            ("--scales",),
            {**text, "default": "absmax", "help": "absmax, mse or signed-mse (least error). [absmax]"},
        ),
        (("--rank",), {**number, "default": 16, "help": "Rank of the adapters. [16]"}),
        (("--alpha",), {"type": float, "metavar": "X", "help": "lora_alpha. [the rank: a scaling of 1]"}),
        (("--rslora/--no-rslora",), {"default": False, "help": "Scaling is alpha / sqrt(rank). [no]"}),
        (("--rank-pattern",), {**pairs, "help": "Another rank for the modules that a regex matches."}),
        (("--alpha-pattern",), {**pairs, "help": "Another alpha for the modules that a regex matches."}),
        (
            ("--init", "--method", "method"),
            {
                **text,
                "help": "loftq, qpissa, qlora (no correction); with --calibration recipe, recipe-fast, qera, "
                "qera-diag, cloq, ... [recipe with --calibration, else loftq]",
            },
        ),
        (("--iters",), {**number, "help": "Alternations; the best one is kept. [5; recipe: 4]"}),
        (
            ("--calibration",),
            {"metavar": "TEXTS", "help": "Texts that the model should do well on: .txt, .jsonl or a folder."},
        ),
        (("--calibration-windows",), {**number, "default": 64, "help": "Windows of text. [64]"}),
        (("--window",), {**number, "help": "Tokens of a window. [1024, or what the tokenizer allows]"}),
        (("--save-calibration",), {"metavar": "FILE", "help": "Keep what calibration found."}),
        (("--load-calibration",), {"metavar": "FILE", "help": "Use what an earlier run kept."}),
        (
            ("--propagate/--no-propagate",),
            {
                "default": False,
                "help": "Solve the layers one behind the other, so that later ones undo some of the error of "
                "those before. [no]",
            },
        ),
        (
            ("--damping",),
            {"type": float, "default": 0.01, "metavar": "X", "help": "[0.01]"},
        ),
        (
            ("--budget",),
            {
                "type": float,
                "metavar": "BITS",
                "help": "Average bits a weight, scales included; every layer gets its own width.",
            },
        ),
        (("--svd",), {**text, "default": "fast", "help": "fast (error within 0.1 %) or exact. [fast]"}),
        (
            ("--together/--no-together",),
            {
                "default": False,
                "help": "Solve layers of one shape at once, for a GPU that one does not fill: more memory; "
                "equal up to rounding, not to the byte. [no]",
            },
        ),
        (("--seed",), {**number, "default": 0, "help": "Of everything random. [0]"}),
        (
            ("--target-modules",),
            {
                "multiple": True,
                "default": ("all-linear",),
                "metavar": "NAMES|REGEX",
                "help": "Modules to quantise and adapt: names, one regex, or all-linear. [all-linear]",
            },
        ),
        (
            ("--target-parameters",),
            {
                "multiple": True,
                "metavar": "NAMES",
                "help": "Stacked experts to quantise and adapt, e.g. gate_up_proj,down_proj; a rank for each "
                "expert. [none]",
            },
        ),
        (
            ("--exclude-modules",),
            {"multiple": True, "metavar": "NAMES|REGEX", "help": "Modules to leave alone."},
        ),
        (
            ("--quantize-rest/--no-quantize-rest",),
            {"default": False, "help": "Quantise the other Linears, too, without an adapter. [no]"},
        ),
        (
            ("--quantize-experts/--no-quantize-experts",),
            {
                "default": None,
                "help": "Quantise stacked experts, too; saved natively. [yes where the native format is "
                "saved anyway]",
            },
        ),
        (
            ("--save-format",),
            {
                **text,
                "default": "auto",
                "help": "bnb (bitsandbytes: nf4, fp4), native (every format) or dense (dequantised). [bnb "
                "where it can be, else native]",
            },
        ),
        (
            ("--dtype",),
            {**text, "default": "auto", "help": "Of the model: float16, bfloat16, float32. [as it is]"},
        ),
        (("--adapter-dtype",), {**text, "default": "float32", "help": "Of A and B. [float32]"}),
        (("--max-shard-size",), {**text, "default": "5GB", "help": "Largest weight file. [5GB]"}),
        (("--device",), {**text, "default": "auto", "help": "auto, cpu, cuda or cuda:N. [auto]"}),
        (("--revision",), {**text, "help": "Branch, tag or commit of a hub model."}),
        (("--trust-remote-code",), {**flag, "help": "Let Python files that come with the model run."}),
        (
            ("--config",),
            {
                "metavar": "FILE",
                "is_eager": True,
                "callback": _use_recipe,
                "help": "A recipe (.toml, .yaml, .json) of these options; the command line wins.",
            },
        ),
        (("--dry-run",), {**flag, "help": "Show the plan: layers, bits, sizes, memory. Writes nothing."}),
        (("--overwrite",), {**flag, "help": "Replace OUT, once the new one is whole; begin anew."}),
        (("--resume",), {**flag, "help": "Go on with an interrupted run; finished layers are kept."}),
        (("--verify",), {**flag, "help": "Read OUT again and check it against the solver's figures."}),
        (("--quiet",), {**flag, "help": "Print nothing but errors."}),
        (("--json", "as_json"), {**flag, "help": "Print JSON lines: plan, one a layer, totals."}),
    ]
    version = {
        **flag,
        "is_eager": True,
        "expose_value": False,
        "callback": _show_version,
        "help": "Show the version.",
    }
    for names, settings in reversed([*options, (("--version",), version)]):
        function = click.option(*names, **settings)(function)
    return function


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXAMPLES,
    help="Quantise MODEL (a folder in Hugging Face layout, or a hub id) and write OUT: its weights in few "
    "bits, and in OUT/loftq_init a LoRA adapter that makes dequantised base + scaling * B @ A as near to the "
    "original weights as it can be. Transformers with bitsandbytes and PEFT load both.",
)
@click.argument("model")
@click.argument("out", type=common.UserPath())
@_options
def command(model: str, out: Path, **given: Any) -> int:
    """The command's body; see ``--help``."""
    from qlora_engine.cli import loftq_init_run

    return loftq_init_run.execute(model, out, given, shlex.join([PROGRAM, *sys.argv[1:]]))


def _hint() -> str:
    from qlora_engine.cli import loftq_init_run

    return loftq_init_run.how_to_go_on()


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of the console script."""
    common.run_command(PROGRAM, command, arguments, hint=_hint)


if __name__ == "__main__":
    main()
