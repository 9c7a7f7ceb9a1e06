"""The body of ``loftq-init``: from parsed options to a finished folder."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qlora_engine import distributed, inits
from qlora_engine.cli import common
from qlora_engine.errors import InputError
from qlora_engine.files import at_home
from qlora_engine.layer_plan import LayerPlan
from qlora_engine.options import FORMAT_OF_BITS, InitOptions, default_iters, init_methods
from qlora_engine.plan import Plan
from qlora_engine.report import LayerReport, RunReport, dumps
from qlora_engine.report_table import human_bytes, human_seconds, human_width, summary
from qlora_engine.safetensors_io import DTYPE_BITS, STORED_DTYPE

_LOG_SECONDS = 10.0  # between lines of progress where there is no terminal
_state: dict[str, Path] = {}


def how_to_go_on() -> str:
    """What to add to an error once work has been kept."""
    from qlora_engine.workspace import RUN_FILE, Workspace

    out = _state.get("out")
    if out is None:
        return ""
    root = Workspace.folder_for(Path(os.path.realpath(out)))
    kept = os.path.exists(root / RUN_FILE)  # where Path.exists raises, for a name that is too long, False
    return f"; finished layers are kept in {root}, --resume goes on" if kept else ""


def parse_options(given: dict[str, Any]) -> InitOptions:
    """The solver's options out of the command's.

    Raises:
        InputError: a value that is not allowed.
    """
    bits, name = given["bits"], given["format"]
    if bits is not None and name is not None:
        raise InputError(f"--bits {bits} and --format {name}: give one of them")
    if bits is not None and bits not in FORMAT_OF_BITS:
        raise InputError(f"--bits {bits}; allowed: {', '.join(map(str, FORMAT_OF_BITS))} (or a --format)")
    calibrated = bool(given["calibration"] or given["load_calibration"])
    method = given["method"] or ("recipe" if calibrated else "loftq")
    if method in init_methods() and inits.get(method).needs_hessian and not calibrated:
        raise InputError(f"--method {method} needs --calibration TEXTS (or --load-calibration FILE)")
    budget = given["budget"]
    if budget is not None and (bits is not None or name is not None or given["bits_pattern"]):
        raise InputError("--budget chooses the widths: leave out --bits, --format and --bits-pattern")
    if given["propagate"]:
        _check_propagate(given, method)
    if given["together"] and calibrated:
        raise InputError("--together is for methods without calibration; leave it or --calibration out")
    same = (
        "block_size", "double_quant", "rank", "alpha", "rslora", "scales", "svd", "seed", "damping",
        "propagate", "together", "quantize_rest", "quantize_experts", "dtype", "adapter_dtype",
        "max_shard_size", "save_format", "trust_remote_code",
    )  # fmt: skip
    return InitOptions(
        method=method,
        iters=default_iters(method) if given["iters"] is None else given["iters"],
        format=name or FORMAT_OF_BITS[bits or 4],
        bits_pattern=common.parse_pairs("--bits-pattern", given["bits_pattern"], str),
        rank_pattern=common.parse_pairs("--rank-pattern", given["rank_pattern"], common.whole_number),
        alpha_pattern=common.parse_pairs("--alpha-pattern", given["alpha_pattern"], common.number),
        target_modules=common.parse_targets("--target-modules", given["target_modules"]),
        target_parameters=tuple(
            name for names in given["target_parameters"] for name in names.split(",") if name
        ),
        exclude_modules=common.parse_targets("--exclude-modules", given["exclude_modules"]),
        **{key: given[key] for key in same},
    )


def _check_propagate(given: dict[str, Any], method: str) -> None:
    """Refuse what cannot be done behind layers that are being solved."""
    if not given["calibration"] or given["load_calibration"] or given["save_calibration"]:
        raise InputError(
            "--propagate runs the texts through what is solved already: it needs --calibration TEXTS and has "
            "no use for --load-calibration and --save-calibration"
        )
    if method in init_methods() and not inits.get(method).needs_hessian:
        raise InputError(
            f"--propagate: {method} makes no use of what the texts bring; choose another --method"
        )


def execute(model: str, out: Path, given: dict[str, Any], command: str) -> int:
    """Plan, run and print; the exit status."""
    options = parse_options(given)  # before the slow imports: a wrong option is told at once
    # torch and transformers take seconds to import
    from qlora_engine import calibrated_run, pipeline
    from qlora_engine.architecture import read_architecture
    from qlora_engine.checkpoint import Checkpoint
    from qlora_engine.hub import find_model
    from qlora_engine.plan import make_plan
    from qlora_engine.workspace import check_output

    source = _source(given)
    device = pipeline.choose_device(given["device"])
    is_main = distributed.join(device.type).is_main  # of the processes of torchrun, if it started this
    folder = find_model(model, revision=given["revision"], code=options.trust_remote_code)
    checkpoint = Checkpoint.open(folder)
    architecture = read_architecture(folder, checkpoint.config, trust_remote_code=options.trust_remote_code)
    plan = make_plan(checkpoint, architecture, options)
    quiet, as_json = given["quiet"] or not is_main, given["as_json"] and is_main
    screen = common.console(sys.stdout, quiet=quiet or as_json)
    if as_json:
        common.emit(dumps({"event": "plan", **plan_facts(plan)}))
    if given["dry_run"]:
        screen.print(plan_table(plan))
        for note in plan.notes:
            screen.print(Text(f"note: {note}"))
        if given["budget"] is not None:
            screen.print(Text("note: --budget chooses the widths once the layers' errors are measured"))
        return 0
    _state["out"] = out
    calibration, identity, propagation = None, None, None
    if options.propagate and distributed.world().size > 1:
        raise InputError("--propagate solves one layer behind the other: start it without torchrun")
    if source.given or given["budget"] is not None:
        check_output(out, overwrite=given["overwrite"] or given["resume"])
    with calibrated_run.alone(source, out) if is_main else nullcontext():
        try:
            if source.given or given["budget"] is not None:
                plan, calibration, identity = _calibrated(plan, out, source, given, device, screen)
            if options.propagate:
                propagation = calibrated_run.propagation(source, plan, device)
                identity = {**calibrated_run.texts_identity(source, device), "blend": propagation.blend}
            with _progress(plan, quiet=quiet, as_json=as_json) as progress:
                report = pipeline.run(
                    plan,
                    out,
                    device=device,
                    model=model,
                    command=command,
                    overwrite=given["overwrite"],
                    resume=given["resume"],
                    progress=progress,
                    calibration=calibration,
                    calibrated=identity,
                    propagation=propagation,
                )
        except InputError:
            if is_main:
                calibrated_run.forget(source, out)
            raise
        if is_main:
            calibrated_run.forget(source, out)
    if not is_main:
        return 0
    if as_json:
        common.emit(dumps({"event": "done", "out": str(out)} | run_facts(report)))
    screen.print(summary(report))
    if given["verify"]:
        from qlora_engine.verify import verify

        verified = verify(plan, out)
        if as_json:
            common.emit(dumps({"event": "verified"} | asdict(verified)))
        screen.print(Text(f"\n{verified}"), soft_wrap=True)
    screen.print(Text(next_steps(out, plan, report)), soft_wrap=True)
    return 0


def _source(given: dict[str, Any]) -> Any:
    from qlora_engine.calibrated_run import Source

    paths = {
        field: None if given[option] is None else at_home(given[option])
        for field, option in (
            ("texts", "calibration"),
            ("load", "load_calibration"),
            ("save", "save_calibration"),
        )
    }
    return Source(**paths, windows=given["calibration_windows"], window=given["window"])


def _calibrated(
    plan: Plan, out: Path, source: Any, given: dict[str, Any], device: Any, screen: Any
) -> tuple[Plan, Any, Any]:
    """The plan with the budget shared out, the calibration and what identifies it."""
    from qlora_engine import calibrated_run
    from qlora_engine.plan import make_plan

    calibration, identity = None, None
    is_main = distributed.world().is_main
    quiet = given["quiet"] or given["as_json"] or not is_main
    if source.given and (not given["propagate"] or given["budget"] is not None):
        log = None if quiet else _CalibrationLog().update

        def obtain() -> Any:
            return calibrated_run.obtain(
                source, plan, out, device, sensitivities=given["budget"] is not None, progress=log
            )

        made = distributed.together(lambda: obtain() if is_main else None)
        calibration, identity = distributed.together(lambda: made or obtain())  # others read what one made
    if given["budget"] is None:
        return plan, calibration, identity
    options, notes = distributed.from_main(
        lambda: calibrated_run.share_out(plan, given["budget"], calibration, device)[::2]
    )
    plan = make_plan(plan.checkpoint, plan.architecture, options)
    plan = replace(plan, notes=plan.notes + notes)
    screen.print(plan_table(plan), *(Text(note) for note in notes))
    if given[
        "propagate"
    ]:  # what calibration found has told the widths, and is not what layers are solved with
        calibration = None
    return plan, calibration, identity


class _CalibrationLog:
    """A line at most every few seconds while text runs through the model."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def update(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if now - self.last >= _LOG_SECONDS or done == total:
            self.last = now
            print(f"calibrating {done}/{total}: {what}", file=sys.stderr, flush=True)


def plan_facts(plan: Plan) -> dict[str, Any]:
    """The plan, JSON-able."""
    return {
        "architecture": plan.architecture.class_name,
        "save_format": plan.save_format,
        "dtype": plan.dtype,
        "bytes_in": plan.checkpoint.nbytes,
        "bytes_out": bytes_out(plan),
        "expected_memory": expected_memory(plan),
        "notes": list(plan.notes),
        "layers": [
            {
                "name": layer.path,
                "kind": layer.module.kind,
                "shape": list(layer.module.shape),
                "rank": layer.rank,
                "scaling": layer.scaling,
                **layer.spec.to_dict(),
                "bytes_in": layer.entry.nbytes,
                "bytes_out": plan.layer_bytes(layer),
                "adapter_bytes": adapter_bytes(plan, layer),
            }
            for layer in plan.layers
        ],
    }


def run_facts(report: RunReport) -> dict[str, Any]:
    """A report without its layers, JSON-able."""
    values = report.to_json()
    del values["layers"]
    return values


def bytes_out(plan: Plan) -> int:
    """Bytes of the weight files to come."""
    rest = sum(plan.rest_bytes(entry) for entry in plan.rest)
    return rest + sum(plan.layer_bytes(layer) for layer in plan.layers)


def adapter_bytes(plan: Plan, *layers: LayerPlan) -> int:
    """Bytes of the adapter's factors of the given layers."""
    element = DTYPE_BITS[STORED_DTYPE[plan.options.adapter_dtype]] // 8
    return sum(layer.factor_bytes(element) for layer in layers)


def expected_memory(plan: Plan) -> int:
    """Bytes of resident memory that a run on the CPU will take at most, from measurements; see benchmarks."""
    return 700_000_000 + 24 * plan.largest.numel


def plan_table(plan: Plan) -> Table:
    """The plan by kind of layer, with sizes."""
    title = f"{plan.architecture.class_name}: {len(plan.layers)} layers to quantise"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, collapse_padding=True)
    for name in ("layers", "shape", "format", "rank", "scaling", "size", "becomes", "adapter"):
        table.add_column(name, justify="left" if name in ("layers", "format") else "right")
    counts: Counter[tuple[Any, ...]] = Counter()
    before: Counter[tuple[Any, ...]] = Counter()
    after: Counter[tuple[Any, ...]] = Counter()
    factors: Counter[tuple[Any, ...]] = Counter()
    for layer in plan.layers:
        width = human_width(layer.spec)
        name = ".".join("*" if part.isdecimal() else part for part in layer.path.split("."))
        shape = "x".join(map(str, layer.module.shape))
        key = (name, shape, width, str(layer.rank or "-"), f"{layer.scaling:g}" if layer.rank else "-")
        counts[key] += 1
        before[key] += layer.entry.nbytes
        after[key] += plan.layer_bytes(layer)
        factors[key] += adapter_bytes(plan, layer)
    for (name, *cells), count in counts.items():
        key = (name, *cells)
        sizes = before[key], after[key], factors[key]
        table.add_row(Text(f"{count} x {name}"), *cells, *map(human_bytes, sizes))
    sizes = plan.checkpoint.nbytes, bytes_out(plan), adapter_bytes(plan, *plan.layers)
    total = map(human_bytes, sizes)
    table.add_row(Text("whole model", style="bold"), "", f"{plan.save_format}, {plan.dtype}", "", "", *total)
    memory = human_bytes(expected_memory(plan))
    table.caption = f"largest layer {plan.largest.path}; expected peak memory on a CPU {memory}"
    table.caption_justify = "left"
    return table


@contextmanager
def _progress(plan: Plan, *, quiet: bool, as_json: bool) -> Iterator[Any]:
    """What to call after each layer: JSON lines, a bar on a terminal, or a line now and then."""
    if as_json:
        yield lambda layer, kept: common.emit(dumps({"event": "layer", "kept": kept} | layer.to_json()))
    elif quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(plan) as update:
            yield update
    else:
        yield _Log(len(plan.layers)).update


@contextmanager
def _bar(plan: Plan) -> Iterator[Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=common.console(sys.stderr), transient=True) as progress:
        task = progress.add_task("reading", total=len(plan.layers))

        def update(layer: LayerReport, kept: bool) -> None:
            text = f"{layer.name} {layer.error_plain:.4f} -> {layer.error:.4f}"
            progress.update(task, advance=1, description=f"{text} (kept)" if kept else text)

        yield update


class _Log:
    """A line of progress at most every few seconds, for log files."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.kept = total, 0, 0
        self.began = self.last = time.monotonic()

    def update(self, layer: LayerReport, kept: bool) -> None:
        self.done += 1
        self.kept += kept
        now = time.monotonic()
        if now - self.last < _LOG_SECONDS or kept:
            return
        self.last = now
        left = (now - self.began) / (self.done - self.kept) * (self.total - self.done)
        print(
            f"{self.done}/{self.total} {layer.name}: {layer.error_plain:.4f} -> {layer.error:.4f}, "
            f"about {human_seconds(left)} left",
            file=sys.stderr,
            flush=True,
        )


def next_steps(out: Path, plan: Plan, report: RunReport) -> str:
    """What to run next, ready to be copied."""
    adapter = out / "loftq_init"
    task = plan.architecture.task
    classes = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
    classes["FEATURE_EXTRACTION"] = "AutoModel"
    auto = classes.get(str(task), plan.architecture.class_name)
    if report.save_format == "native":
        load = (
            "    import qlora_engine as qe\n"
            f"    model = qe.from_pretrained({str(out)!r})\n"
            f"    model = qe.PeftModel.from_pretrained(model, {str(adapter)!r}, is_trainable=True)\n"
        )
    else:
        load = (
            f"    from transformers import {auto}\n"
            "    from peft import PeftModel\n"
            f"    model = {auto}.from_pretrained({str(out)!r})\n"
            f"    model = PeftModel.from_pretrained(model, {str(adapter)!r}, is_trainable=True)\n"
        )
    train = ""
    if task == "CAUSAL_LM":
        line = shlex.join(["qlora-finetune", str(out), "--data", "TEXTS.jsonl", "--output", "ADAPTER"])
        train = f"or by a command:\n    {line}\n\n"
    merge = shlex.join(["qlora-merge", str(out), str(adapter), "MERGED"])
    return (
        f"\nWrote {out}; the report is {out / 'report.html'}\n\nTo train it, in Python:\n{load}\n{train}"
        f"To merge the adapter into a dense model:\n    {merge}\n"
    )
