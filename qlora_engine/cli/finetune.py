"""``qlora-finetune MODEL``: train LoRA adapters on a quantised model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import click

from qlora_engine.cli import common

PROGRAM = "qlora-finetune"
EXAMPLES = """
\b
Examples:
  qlora-finetune out --data train.jsonl --output adapter
  qlora-finetune out --data train.jsonl --output adapter --resume
  qlora-finetune meta-llama/Llama-3.2-1B --bits 4 --rank 16 --data chats.jsonl --output adapter
  qlora-finetune out --data train.jsonl --output adapter --estimate
  torchrun --nproc-per-node 2 -m qlora_engine.cli.finetune out --data train.jsonl --output adapter
"""


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Every option of the command, in the order of its help."""
    text, flag = {"metavar": "TEXT"}, {"is_flag": True}
    whole, real = {"type": int, "metavar": "N"}, {"type": float, "metavar": "X"}
    options: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        (("--data",), {**text, "help": ".jsonl (text; prompt, completion; messages) or .txt."}),
        (("--output",), {**text, "help": "Folder for the adapter, its checkpoints and logs."}),
        (("--adapter",), {**text, "help": "Adapter to go on from. [MODEL/loftq_init, if it is there]"}),
        (("--validation",), {**text, "help": "Rows to evaluate on. [a part of --data]"}),
        (("--validation-fraction",), {**real, "default": 0.05, "help": "Part of --data held out. [0.05]"}),
        (("--epochs",), {**real, "default": 1.0, "help": "Passes over the data. [1]"}),
        (("--max-steps",), {**whole, "default": 0, "help": "Stop after so many steps. [--epochs decide]"}),
        (("--batch-size",), {**whole, "default": 4, "help": "Sequences at once on a device. [4]"}),
        (("--accumulate",), {**whole, "default": 1, "help": "Batches a step. [1]"}),
        (("--max-length",), {**whole, "default": 1024, "help": "Tokens of a sequence. [1024]"}),
        (("--packing",), {**text, "default": "auto", "help": "Rows share sequences: auto, on, off. [auto]"}),
        (("--train-on",), {**text, "default": "completion", "help": "completion or all. [completion]"}),
        (("--skip-bad-rows",), {**flag, "help": "Pass over rows that cannot be used."}),
        (("--learning-rate",), {**real, "default": 2e-4, "help": "At its peak. [0.0002]"}),
        (("--lora-plus",), {**real, "help": "Learning rate of B over that of A (LoRA+). [1]"}),
        (("--scheduler",), {**text, "default": "cosine", "help": "transformers' name. [cosine]"}),
        (("--warmup",), {**real, "default": 0.03, "help": "Part of the steps. [0.03]"}),
        (("--weight-decay",), {**real, "default": 0.0, "help": "AdamW's. [0]"}),
        (("--max-grad-norm",), {**real, "default": 1.0, "help": "Gradients are clipped to it. [1]"}),
        (("--neftune",), {**real, "help": "Noise of the embeddings, e.g. 5. [none]"}),
        (("--loss",), {**text, "default": "auto", "help": "liger (liger-kernel, on a GPU), chunked (ours), "
                   "or auto: liger where it can run. [auto]"}),
        (("--cuda-graphs",), {**text, "default": "auto", "help": "Replay decoder layers from CUDA graphs: "
                          "auto (packed rows, enough memory), on or off. [auto]"}),
        (("--precision",), {**text, "default": "auto", "help": "auto, bf16, fp16 or fp32. [auto]"}),
        (("--optimizer",), {**text, "default": "adamw_torch", "help": "transformers' name. [adamw_torch]"}),
        (("--evaluate-every",), {**whole, "default": 0, "help": "Steps. [once an epoch]"}),
        (("--save-every",), {**whole, "default": 0, "help": "Steps. [once an epoch]"}),
        (("--early-stopping",), {**whole, "default": 0, "help": "Evaluations without gain till it ends."}),
        (("--keep",), {**whole, "default": 2, "help": "Checkpoints kept. [2]"}),
        (("--recompute",), {**text, "default": "auto", "help": "auto, none, full, or a count of layers."}),
        (("--offload",), {**text, "help": "Kept on the host: embedding, activations (inputs of recomputed "
                          "layers), or both with a comma. [none]"}),
        (("--shard",), {**flag, "help": "Under torchrun: spread the model over the GPUs (FSDP2), not a copy "
                        "on each."}),
        (("--memory-limit",), {**real, "help": "GiB that a step may take. [the GPU's]"}),
        (("--estimate",), {**flag, "help": "Show the memory plan, train nothing."}),
        (("--bits",), {**whole, "help": "For a dense MODEL, quantised on the fly. [4]"}),
        (("--rank",), {**whole, "help": "Of a new adapter. [16]"}),
        (("--alpha",), {**real, "help": "lora_alpha of a new adapter. [the rank]"}),
        (("--dropout",), {**real, "help": "Of the adapter's input in training. [the adapter's own; 0]"}),
        (("--target-modules",), {"multiple": True, "metavar": "NAMES|REGEX",
                                 "help": "Of a new adapter. [all-linear]"}),
        (("--seed",), {**whole, "default": 0, "help": "Of everything random. [0]"}),
        (("--device",), {**text, "default": "auto", "help": "auto, cpu, cuda or cuda:N. [auto]"}),
        (("--sample",), {**text, "help": "A prompt to complete at the end."}),
        (("--tensorboard",), {**flag, "help": "Write event files too."}),
        (("--trust-remote-code",), {**flag, "help": "Let Python files that come with the model run."}),
        (("--resume",), {**flag, "help": "Go on with an interrupted run."}),
        (("--overwrite",), {**flag, "help": "Begin anew in an --output that holds a run."}),
        (("--quiet",), {**flag, "help": "Print nothing but errors."}),
        (("--json", "as_json"), {**flag, "help": "Print JSON lines: plan, logs, outcome."}),
    ]  # fmt: skip
    for names, settings in reversed(options):
        function = click.option(*names, **settings)(function)
    return function


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=EXAMPLES
)
@click.argument("model")
@_options
@click.version_option(common.package_version(), prog_name=PROGRAM)
def command(model: str, **options: Any) -> None:
    """Fine-tune LoRA adapters on MODEL, an output of loftq-init or a dense model (a folder or a hub id)."""
    from qlora_engine.cli import finetune_run  # torch and transformers take seconds to import

    finetune_run.run(model, options)


def _hint() -> str:
    from qlora_engine.cli import finetune_run

    return finetune_run.how_to_go_on()


def main(arguments: list[str] | None = None) -> NoReturn:
    """The console script."""
    common.run_command(PROGRAM, command, arguments, hint=_hint)


if __name__ == "__main__":
    main()
