"""One run of ``qlora-finetune``: the options checked, the model loaded and trained, the outcome printed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_engine import distributed
from qlora_engine.cli.finetune_display import Display
from qlora_engine.cli.finetune_model import base_and_adapter, device_of, load
from qlora_engine.errors import InputError
from qlora_engine.files import Lock, at_home

_state: dict[str, Path] = {}


def how_to_go_on() -> str:
    """What to add to an error once there is a checkpoint."""
    from qlora_engine.training.output import COMPLETE

    folder = _state.get("checkpoints")
    with contextlib.suppress(OSError):  # the name may be what was wrong
        if folder is not None and any(folder.glob(f"checkpoint-*/{COMPLETE}")):
            return f"; checkpoints are in {folder}, --resume goes on"
    return ""


def run(model_name: str, options: dict[str, Any]) -> None:
    """Check the options, load the model, train, say what came out.

    Raises:
        InputError: whatever is wrong with the options, the model or the data.
    """
    settings = settings_of(options)
    output = settings.output
    _state["checkpoints"] = output / "checkpoints"
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


def _run(model_name: str, options: dict[str, Any], settings: Any) -> None:
    output = settings.output
    if settings.shard and distributed.world().size == 1:
        raise InputError("--shard spreads the model over several processes: start it with torchrun")
    distributed.join(device_of(options["device"]).type)
    from qlora_engine.training import memory
    from qlora_engine.training.data import check_file
    from qlora_engine.training.output import check_output
    from qlora_engine.training.run import finetune

    if not options["estimate"]:
        flags = {name: options[name] for name in ("resume", "overwrite")}
        distributed.from_main(lambda: check_output(output, **flags))
    for path in (settings.data, settings.validation):  # before a dense model is quantised
        if path is not None:
            check_file(path)

    is_main = distributed.world().is_main
    show = Display(quiet=options["quiet"] or not is_main, as_json=options["as_json"])
    if not is_main:
        _be_quiet()
    with (
        base_and_adapter(model_name, options, output, show) as (folder, adapter),
        _advice_when_out_of_memory(settings),
    ):
        model, tokenizer = load(folder, adapter, options)
        if options["estimate"]:
            show.plan(memory.fit(model, settings))
            return
        outcome = finetune(
            model,
            tokenizer,
            settings,
            resume=options["resume"],
            report=show.log,
            show_plan=show.plan,
            say=show.say,
        )
        show.outcome(outcome, output, str(folder))


@contextmanager
def _advice_when_out_of_memory(settings: Any) -> Iterator[None]:
    from qlora_engine.training.memory import when_out_of_memory

    try:
        yield
    except Exception as error:
        on_gpu = type(error).__name__ == "OutOfMemoryError"
        if not on_gpu and "DefaultCPUAllocator" not in str(error) and not isinstance(error, MemoryError):
            raise
        what = str(error).splitlines()[0] if str(error) else "no more can be had"
        raise InputError(
            f"out of {'GPU ' * on_gpu}memory: {what} What helps, the cheapest first: "
            f"{when_out_of_memory(settings)}"
        ) from error


def _be_quiet() -> None:
    """What libraries have to say, one process says."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def settings_of(options: dict[str, Any]) -> Any:
    """The options as training settings."""
    from qlora_engine.training.settings import Settings

    for name in ("data", "output"):
        if not options[name]:
            raise InputError(f"--{name} is needed")
    names = {field.name for field in dataclasses.fields(Settings)}
    values = {name: value for name, value in options.items() if name in names}
    for name in ("data", "output", "validation"):
        if "\0" in (values[name] or ""):
            raise InputError(f"--{name} {values[name]!r}: no file can have that name")
        values[name] = None if values[name] is None else at_home(values[name])
    return Settings(**values)
