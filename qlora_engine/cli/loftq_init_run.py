"""The body of ``loftq-init``: from parsed options to a finished folder."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.text import Text

from qlora_engine import distributed, inits
from qlora_engine.cli import common
from qlora_engine.cli.loftq_init_plan import plan_facts, plan_table
from qlora_engine.cli.progress import CalibrationLog, progress
from qlora_engine.errors import InputError
from qlora_engine.files import at_home, file_to_write
from qlora_engine.options import FORMAT_OF_BITS, InitOptions, default_iters, init_methods
from qlora_engine.plan import Plan
from qlora_engine.report import LayerReport, RunReport, dumps
from qlora_engine.report_table import summary

_state: dict[str, Path] = {}


def how_to_go_on() -> str:
    """What to add to an error once work has been kept."""
    return common.kept_work(_state.get("out"), "layers")


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
    from qlora_engine import pipeline
    from qlora_engine.architecture import read_architecture
    from qlora_engine.checkpoint import Checkpoint
    from qlora_engine.hub import find_model
    from qlora_engine.plan import make_plan

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
    plan, report = _solve(plan, out, source, given, device, screen, model=model, command=command)
    if is_main:
        _tell(plan, out, report, given, screen)
    return 0


def _solve(
    plan: Plan,
    out: Path,
    source: Any,
    given: dict[str, Any],
    device: Any,
    screen: Any,
    **named: str,
) -> tuple[Plan, RunReport]:
    """Calibrate where texts are given, share out a budget, solve and write; the plan with its budget.

    ``named``: how the user named the model and the command, for the report.
    """
    from qlora_engine import calibrated_run, pipeline
    from qlora_engine.workspace import check_output

    here = distributed.world()
    calibration, identity, propagation = None, None, None
    if given["propagate"] and here.size > 1:
        raise InputError("--propagate solves one layer behind the other: start it without torchrun")
    prepares = source.given or given["budget"] is not None
    if prepares:
        check_output(out, overwrite=given["overwrite"] or given["resume"])
    with calibrated_run.alone(source, out) if here.is_main else nullcontext():
        try:
            if prepares:
                plan, calibration, identity = _calibrated(plan, out, source, given, device, screen)
            if given["propagate"]:
                propagation = calibrated_run.propagation(source, plan, device)
                identity = {**calibrated_run.texts_identity(source, device), "blend": propagation.blend}
            quiet, as_json = given["quiet"] or not here.is_main, given["as_json"] and here.is_main
            with progress(len(plan.layers), _describe, quiet=quiet, as_json=as_json) as update:
                report = pipeline.run(
                    plan,
                    out,
                    device=device,
                    overwrite=given["overwrite"],
                    resume=given["resume"],
                    progress=update,
                    calibration=calibration,
                    calibrated=identity,
                    propagation=propagation,
                    **named,
                )
        except InputError:
            if here.is_main:
                calibrated_run.forget(source, out)
            raise
        if here.is_main:
            calibrated_run.forget(source, out)
    return plan, report


def _tell(plan: Plan, out: Path, report: RunReport, given: dict[str, Any], screen: Any) -> None:
    """What came out, whether it is what it should be, and what to run next."""
    if given["as_json"]:
        common.emit(dumps({"event": "done", "out": str(out)} | run_facts(report)))
    screen.print(summary(report))
    if given["verify"]:
        from qlora_engine.verify import verify

        verified = verify(plan, out)
        if given["as_json"]:
            common.emit(dumps({"event": "verified"} | asdict(verified)))
        screen.print(Text(f"\n{verified}"), soft_wrap=True)
    screen.print(Text(next_steps(out, plan, report)), soft_wrap=True)


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
    if paths["save"] is not None:
        paths["save"] = file_to_write("--save-calibration", paths["save"])
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
        log = None if quiet else CalibrationLog().update

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
    if given["propagate"]:  # the calibration has told the widths; layers are solved with what they meet
        calibration = None
    return plan, calibration, identity


def _describe(layer: LayerReport) -> str:
    return f"{layer.name}: {layer.error_plain:.4f} -> {layer.error:.4f}"


def run_facts(report: RunReport) -> dict[str, Any]:
    """A report without its layers, JSON-able."""
    values = report.to_json()
    del values["layers"]
    return values


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
