"""``qlora-finetune MODEL``: train LoRA adapters on a quantised model."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from qlora_engine import distributed
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
        (("--early-stopping",), {**whole, "default": 0, "help": "Evaluations without gain till it ends."}),
        (("--keep",), {**whole, "default": 2, "help": "Checkpoints kept. [2]"}),
        (("--recompute",), {**text, "default": "auto", "help": "auto, none, full, or a count of layers."}),
        (("--offload",), {**text, "help": "Kept on the host: embedding, activations (inputs of recomputed "
                          "layers), or both with a comma. [none]"}),
        (("--shard",), {**flag, "help": "Under torchrun: spread the model over the GPUs (FSDP2), not a copy "
                        "on each."}),
        (("--memory-limit",), {**real, "help": "GiB that a step may take. [the GPU's]"}),
        (("--estimate",), {**flag, "help": "Show the memory plan, train nothing."}),
        (("--bits",), {**whole, "default": 4, "help": "For a dense MODEL, quantised on the fly. [4]"}),
        (("--rank",), {**whole, "default": 16, "help": "Of a new adapter. [16]"}),
        (("--alpha",), {**real, "help": "lora_alpha of a new adapter. [the rank]"}),
        (("--dropout",), {**real, "help": "Of the adapter's input in training. [the adapter's own; 0]"}),
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
    if not distributed.world().is_main:
        yield
        return
    target = Path(os.path.realpath(output))
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(target.parent / f".{target.name}.lock", target)
    try:
        yield
    finally:
        lock.release(remove=True)


def _check_output(output: Path, options: dict[str, Any]) -> None:
    # A run that was cut off before its settings were written has left nothing to go on from.
    started = any((output / name).exists() for name in ("checkpoints/settings.json", "adapter_config.json"))
    if started and not (options["resume"] or options["overwrite"] or options["estimate"]):
        raise InputError(f"{output} holds a run already; --resume goes on with it, --overwrite begins anew")


def _run(model_name: str, options: dict[str, Any], settings: Any) -> None:
    output = settings.output
    if settings.shard and distributed.world().size == 1:
        raise InputError("--shard spreads the model over several processes: start it with torchrun")
    distributed.join(_device(options["device"]).type)
    distributed.from_main(lambda: _check_output(output, options))
    from qlora_engine.training import run as training

    is_main = distributed.world().is_main
    show = _Display(quiet=options["quiet"] or not is_main, as_json=options["as_json"])
    if not is_main:
        _be_quiet()
    with _base(model_name, options, output, show) as (folder, adapter):
        model, tokenizer = load(folder, adapter, options)
        if options["estimate"]:
            show.plan(training.memory_plan(model, settings))
            return
        if options["overwrite"] and is_main:
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
            what = str(error).splitlines()[0] if str(error) else "out of memory"
            raise InputError(
                f"out of GPU memory: {what} What helps, the cheapest first: "
                f"{training.when_out_of_memory(settings)}"
            ) from error
        show.outcome(outcome, output, str(folder))


def _be_quiet() -> None:
    """What libraries have to say, one process says."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")


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


@contextmanager
def _base(
    name: str, options: dict[str, Any], output: Path, show: _Display
) -> Iterator[tuple[Path, Path | None]]:
    """The folder of a quantised base and that of the adapter to go on from, None for a new one.

    A dense model is quantised by loftq-init's own code into OUTPUT/base (for --estimate, which leaves nothing
    behind, into a temporary folder), so that what was trained can be loaded, merged and resumed.

    Raises:
        InputError: no such model or adapter.
    """
    from qlora_engine.checkpoint import Checkpoint
    from qlora_engine.hub import find_adapter, find_model

    folder = find_model(name, code=options["trust_remote_code"])
    adapter = None if options["adapter"] is None else find_adapter(options["adapter"])
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise InputError(f"--adapter {adapter}: no adapter_config.json in it")
    solved = folder / "loftq_init"
    if adapter is None and (solved / "adapter_config.json").is_file():
        adapter = solved
    if adapter is not None or Checkpoint.open(folder).config.get("quantization_config") is not None:
        yield folder, adapter
    elif options["estimate"]:
        with tempfile.TemporaryDirectory() as temporary:
            base = Path(distributed.from_main(lambda: temporary)) / "base"
            _quantise(folder, base, options, show, method="qlora")
            yield base, base / "loftq_init"
            distributed.barrier()
    else:
        base = output / "base"
        _quantise(folder, base, options, show, method="loftq")
        yield base, base / "loftq_init"


def _quantise(folder: Path, base: Path, options: dict[str, Any], show: _Display, *, method: str) -> None:
    """What ``loftq-init folder base`` does; a base that this has made is used again."""
    from qlora_engine import pipeline
    from qlora_engine.architecture import read_architecture
    from qlora_engine.checkpoint import Checkpoint
    from qlora_engine.options import FORMAT_OF_BITS, InitOptions
    from qlora_engine.plan import make_plan

    if options["bits"] not in FORMAT_OF_BITS:
        raise InputError(f"--bits {options['bits']}; allowed: {', '.join(map(str, FORMAT_OF_BITS))}")
    chosen = InitOptions(
        method=method,
        format=FORMAT_OF_BITS[options["bits"]],
        rank=options["rank"],
        alpha=options["alpha"],
        target_modules=common.parse_targets("--target-modules", options["target_modules"]),
        seed=options["seed"],
        trust_remote_code=options["trust_remote_code"],
    )
    checkpoint = Checkpoint.open(folder)
    architecture = read_architecture(
        folder, checkpoint.config, trust_remote_code=options["trust_remote_code"]
    )
    plan = make_plan(checkpoint, architecture, chosen)
    show.say(f"quantising {folder} to {options['bits']} bits: {base}")
    anew = options["overwrite"]
    device = _device(options["device"])
    pipeline.run(plan, base, device=device, model=str(folder), overwrite=anew, resume=not anew)


def load(folder: Path, adapter: Path | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """The model with the adapter to train, on its device (or sharded), and its tokenizer.

    Args:
        folder: A quantised base, or a dense one that an adapter belongs to.
        adapter: To go on from; None: a new one.
        options: The command's.

    Raises:
        InputError: no such device, or a model that cannot be sharded.
    """
    import torch
    from transformers import AutoTokenizer

    from qlora_engine import LoraConfig, PeftModel, get_peft_model
    from qlora_engine.loading import from_pretrained
    from qlora_engine.training import host
    from qlora_engine.training.run import precision_of
    from qlora_engine.training.sharding import load_sharded

    device = _device(options["device"])
    precision = precision_of(options["precision"], device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    trust = options["trust_remote_code"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder} has no tokenizer that can be read: {line}") from error
    if adapter is not None:
        config = LoraConfig.from_pretrained(str(adapter))
        config.inference_mode = False
        if folder.parent.name != "snapshots":  # not of the hub's cache: the base is where it lies now
            config.base_model_name_or_path = str(folder)
    else:
        targets = common.parse_targets("--target-modules", options["target_modules"])
        config = LoraConfig(
            r=options["rank"],
            lora_alpha=options["rank"] if options["alpha"] is None else options["alpha"],
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(folder),
        )
    if options["dropout"] is not None:
        config.lora_dropout = options["dropout"]
    torch.manual_seed(options["seed"])
    if options["shard"]:
        model = load_sharded(
            folder,
            config,
            adapter,
            dtype=dtype,
            device=device,
            seed=options["seed"],
            trust_remote_code=trust,
        )
        return model, tokenizer
    base = from_pretrained(folder, dtype=dtype, trust_remote_code=trust)
    if "embedding" in host.parse_offload(options["offload"]):
        host.embedding_to_host(base)  # before anything is on the GPU
    if adapter is None:
        return get_peft_model(base.to(device), config), tokenizer
    model = PeftModel.from_pretrained(base.to(device), str(adapter), is_trainable=True, config=config)
    return model, tokenizer


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        local = distributed.world().local_rank
        return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name!r}; allowed: auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: no CUDA GPU is visible")
    if device.type == "cuda" and distributed.world().size > 1:
        return torch.device("cuda", distributed.world().local_rank)
    return device


class _Display:
    """What the command prints: a line a step on a terminal, JSON lines for machines, nothing if quiet."""

    def __init__(self, *, quiet: bool, as_json: bool) -> None:
        self.as_json = as_json
        self.silent = quiet
        self.console = common.console(sys.stderr, quiet=quiet or as_json)
        self.began = time.monotonic()

    def say(self, text: str) -> None:
        """A line for people."""
        self.console.print(text, markup=False)

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
