"""``qlora-finetune MODEL``: train LoRA adapters on a quantised model."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from qlora_engine.cli import common
from qlora_engine.errors import InputError
from qlora_engine.files import Lock

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
        (("--precision",), {**text, "default": "auto", "help": "auto, bf16, fp16 or fp32. [auto]"}),
        (("--optimizer",), {**text, "default": "adamw_torch", "help": "transformers' name. [adamw_torch]"}),
        (("--evaluate-every",), {**whole, "default": 0, "help": "Steps. [once an epoch]"}),
        (("--save-every",), {**whole, "default": 0, "help": "Steps. [once an epoch]"}),
        (("--early-stopping",), {**whole, "default": 0, "help": "Evaluations without gain until it ends."}),
        (("--keep",), {**whole, "default": 2, "help": "Checkpoints kept. [2]"}),
        (("--recompute",), {**text, "default": "auto", "help": "auto, none, full, or a count of layers."}),
        (("--memory-limit",), {**real, "help": "GiB that a step may take. [the GPU's]"}),
        (("--estimate",), {**flag, "help": "Show the memory plan, train nothing."}),
        (("--bits",), {**whole, "default": 4, "help": "For a dense MODEL, quantised on the fly. [4]"}),
        (("--rank",), {**whole, "default": 16, "help": "Of a new adapter. [16]"}),
        (("--alpha",), {**real, "help": "lora_alpha of a new adapter. [the rank]"}),
        (("--dropout",), {**real, "default": 0.0, "help": "Of a new adapter. [0]"}),
        (("--target-modules",), {"multiple": True, "default": ("all-linear",), "metavar": "NAMES|REGEX",
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
    run(model, options)


def run(model_name: str, options: dict[str, Any]) -> None:
    """Check the options, load the model, train, say what came out.

    Raises:
        InputError: whatever is wrong with the options, the model or the data.
    """
    settings = settings_of(options)
    output = settings.output
    if options["estimate"]:
        return _run(model_name, options, settings)
    with _alone(output):
        _run(model_name, options, settings)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep other runs from ``output``; of the processes of one run, the first does it for all.

    Raises:
        InputError: another run is writing there.
    """
    if int(os.environ.get("RANK", "0")):
        yield
        return
    target = Path(os.path.realpath(output))
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(target.parent / f".{target.name}.lock", target)
    try:
        yield
    finally:
        lock.release(remove=True)


def _run(model_name: str, options: dict[str, Any], settings: Any) -> None:
    output = settings.output
    # A run that was cut off before its settings were written has left nothing to go on from.
    started = any((output / name).exists() for name in ("checkpoints/settings.json", "adapter_config.json"))
    if started and not (options["resume"] or options["overwrite"] or options["estimate"]):
        raise InputError(f"{output} holds a run already; --resume goes on with it, --overwrite begins anew")
    from qlora_engine.training import run as training

    show = _Display(quiet=options["quiet"], as_json=options["as_json"])
    model, tokenizer = load(model_name, options)
    if options["estimate"]:
        from qlora_engine.training import recompute

        limit = None if settings.memory_limit is None else int(settings.memory_limit * 2**30)
        plan = recompute.plan(
            model,
            batch_size=settings.batch_size,
            length=settings.max_length,
            recompute=settings.recompute,
            available=limit,
        )
        show.plan(plan)
        return
    if options["overwrite"]:
        import shutil

        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    try:
        outcome = training.finetune(
            model,
            tokenizer,
            settings,
            resume=options["resume"],
            report=show.log,
            show_plan=show.plan,
        )
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        raise InputError(
            f"out of GPU memory: {str(error).splitlines()[0]}; lower --batch-size or --max-length, or "
            "use --recompute full"
        ) from error
    show.outcome(outcome, output, model_name)


def settings_of(options: dict[str, Any]) -> Any:
    """The options as training settings."""
    from qlora_engine.training.run import Settings

    for name in ("data", "output"):
        if not options[name]:
            raise InputError(f"--{name} is needed")
    names = {field.name for field in dataclasses.fields(Settings)}
    values = {name: value for name, value in options.items() if name in names}
    for name in ("data", "output", "validation"):
        values[name] = None if values[name] is None else Path(values[name]).expanduser()
    return Settings(**values)


def load(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """The model with the adapter to train, and its tokenizer.

    Raises:
        InputError: no such model, adapter or device.
    """
    import torch
    from transformers import AutoTokenizer

    from qlora_engine import LoftQConfig, LoraConfig, PeftModel, get_peft_model
    from qlora_engine.hub import find_model
    from qlora_engine.loading import from_pretrained
    from qlora_engine.training.run import precision_of

    device = _device(options["device"])
    precision = precision_of(options["precision"], device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    trust = options["trust_remote_code"]
    folder = find_model(name, code=trust)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    adapter = None if options["adapter"] is None else Path(options["adapter"])
    if adapter is None and (folder / "loftq_init" / "adapter_config.json").is_file():
        adapter = folder / "loftq_init"
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise InputError(f"--adapter {adapter}: no adapter_config.json in it")
    base = from_pretrained(folder, dtype=dtype, trust_remote_code=trust)
    if adapter is not None:
        return PeftModel.from_pretrained(base.to(device), str(adapter), is_trainable=True), tokenizer
    quantised = getattr(base.config, "quantization_config", None) is not None
    rank = options["rank"]
    start: dict[str, Any] = {}
    if not quantised:
        bits = LoftQConfig(loftq_bits=options["bits"], loftq_iter=5)
        start = {"init_lora_weights": "loftq", "loftq_config": bits}
    targets = common.parse_targets("--target-modules", options["target_modules"])
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if options["alpha"] is None else options["alpha"],
        lora_dropout=options["dropout"],
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        **start,
    )
    return get_peft_model(base, config).to(device), tokenizer


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name!r}; allowed: auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: no CUDA GPU is visible")
    return device


class _Display:
    """What the command prints: a line a step on a terminal, JSON lines for machines, nothing if quiet."""

    def __init__(self, *, quiet: bool, as_json: bool) -> None:
        self.as_json = as_json
        self.silent = quiet
        self.console = common.console(sys.stderr, quiet=quiet or as_json)
        self.began = time.monotonic()

    def _emit(self, kind: str, values: dict[str, Any]) -> None:
        if self.as_json and not self.silent:
            print(json.dumps({"kind": kind, **values}), flush=True)

    def plan(self, plan: Any) -> None:
        """The memory plan."""
        self._emit("plan", plan.to_json())
        for line in plan.lines():
            self.console.print(line, markup=False)

    def log(self, log: dict[str, Any]) -> None:
        """A line of Trainer's log."""
        self._emit("log", log)
        step, steps = log["step"], log["steps"]
        if "loss" in log:
            left = (time.monotonic() - self.began) / max(step, 1) * (steps - step)
            self.console.print(
                f"step {step}/{steps}  loss {log['loss']:.4f}  learning rate {log['learning_rate']:.2e}  "
                f"about {left:.0f} s left",
                markup=False,
            )
        elif "eval_loss" in log:
            import math

            perplexity = math.exp(min(log["eval_loss"], 700.0))
            self.console.print(
                f"step {step}/{steps}  validation loss {log['eval_loss']:.4f}  perplexity {perplexity:.3f}",
                markup=False,
            )

    def outcome(self, outcome: Any, output: Path, model: str) -> None:
        """What came out, and how to go on."""
        self._emit("outcome", dataclasses.asdict(outcome))
        for note in outcome.notes:
            self.console.print(f"note: {note}", markup=False)
        if outcome.losses:
            first, last = outcome.losses[0][1], outcome.losses[-1][1]
            self.console.print(
                f"{outcome.steps} steps, training loss {first:.4f} -> {last:.4f}, "
                f"{outcome.tokens_per_second:.0f} tokens/s",
                markup=False,
            )
        if outcome.sample is not None:
            self.console.print(f"sample: {outcome.sample}", markup=False)
        self.console.print(f"adapter: {output}\nnext: qlora-merge {model} {output} merged/", markup=False)


def main(arguments: list[str] | None = None) -> NoReturn:
    """The console script."""
    common.run_command(PROGRAM, command, arguments)


if __name__ == "__main__":
    main()
