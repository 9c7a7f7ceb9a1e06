"""``loftq-init`` over a checkpoint: one weight in memory at a time, and the output appears in one step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .assemble import assemble
from .calibration_result import Calibration
from .checkpoint import natural_order, shard_names, split_shards
from .distributed import barrier, from_main, together, world
from .errors import InputError
from .files import rename_into_place
from .layer_plan import LayerPlan
from .pieces import Pieces
from .plan import Plan
from .propagate_run import Propagation, propagate_layers, propagation_notes
from .report import LayerReport, RunReport, dumps, versions
from .safetensors_io import write_file
from .serialise import TABLE_BYTES, rest_tensor
from .solve import SolvedLayer, solve_layer
from .solve_ahead import solve_ahead
from .workspace import Workspace, check_apart

Progress = Callable[[LayerReport, bool], None]


def choose_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, or the CPU.

    Raises:
        InputError: not a device, or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r}; allowed: auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise InputError(f"device {name!r}; allowed: auto, cpu, cuda, cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"device {name!r} is not there: {count} CUDA devices are visible")
    return device


def describe_run(plan: Plan, device: torch.device, calibrated: Any = None) -> dict[str, Any]:
    """What decides the output's bytes, JSON-able: a resumed run must have the same."""
    return {
        "options": plan.options.to_dict(),
        "input": plan.checkpoint.identity(),
        "device": device.type,
        "version": versions()["qlora-engine"],
    } | ({} if calibrated is None else {"calibration": calibrated})


def run(
    plan: Plan,
    out: Path,
    *,
    device: torch.device,
    model: str = "",
    command: str = "",
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
    calibrated: Any = None,
    propagation: Propagation | None = None,
) -> RunReport:
    """Carry out ``plan`` and put the result into ``out`` in one step.

    Processes that torchrun started and ``distributed.join`` connected share the layers; the output has the
    bytes that one process gives (on CPUs with the same number of threads; on GPUs up to rounding).

    Args:
        plan: From ``make_plan``.
        out: Folder to write; see ``Workspace.open`` for what may be there.
        device: To compute on.
        model: The model as the user named it, for the report.
        command: The command line, for the report.
        overwrite: Replace ``out`` once the new output is whole.
        resume: Go on with an interrupted run; returns at once if ``out`` is already what this run would make.
        progress: Called after each layer with its report and whether it was finished by an earlier run.
        calibration: Second moments of the layers' inputs, for the methods that need them.
        calibrated: What identifies the calibration, JSON-able: a resumed run must have the same.
        propagation: Texts to solve the layers behind one another with, instead of a calibration; one process.

    Raises:
        InputError: what is there cannot be replaced or resumed, or the input turns out to be unusable. No
            trace is left.
        OSError: disk full, a file vanished, ... Finished layers are kept for ``resume``.
    """
    began = time.perf_counter()
    here = world()
    described = describe_run(plan, device, calibrated)
    check_apart(out, plan.checkpoint.folder, "model")
    list(plan.checkpoint.side_files())  # refuses links that lead out of the folder
    opened: list[Workspace] = []  # by the first process, for all

    def end(before: float) -> RunReport:
        notes = plan.notes + _calibration_notes(calibration)
        report = RunReport(
            model=model or str(plan.checkpoint.folder),
            command=command,
            run=described,
            save_format=plan.save_format,
            dtype=plan.dtype,
            layers=(),
            notes=notes + propagation_notes(Pieces(opened[0].pieces)),
            versions=versions(),
            device=_device_name(device) + (f", {here.size} processes" if here.size > 1 else ""),
            bytes_in=plan.checkpoint.nbytes,
        )
        return _end(plan, out, opened[0], report, lambda: before + time.perf_counter() - began)

    with _closed_on_error(opened):
        finished, unsolved = from_main(
            lambda: _begin(plan, out, described, opened, overwrite=overwrite, resume=resume)
        )
        if finished is not None:
            return finished
        root = Workspace.folder_for(Path(os.path.realpath(out)))
        before = 0.0
        if not (root / "done").exists():
            told: set[int] = set()
            if propagation is not None:
                before, told = propagate_layers(
                    plan, Pieces(root / "pieces"), unsolved, device, progress, propagation
                )
            left = [index for index in unsolved if index not in told]
            before += _write_weights(plan, root, left, device, progress, calibration, told)
        return from_main(lambda: end(before))


def _begin(
    plan: Plan,
    out: Path,
    described: dict[str, Any],
    opened: list[Workspace],
    *,
    overwrite: bool,
    resume: bool,
) -> tuple[RunReport | None, list[int]]:
    """The report of an output that is there, or the numbers of the layers that are to be solved.

    The workspace goes to ``opened`` as soon as it is one, so that an error closes it.
    """
    Workspace.tidy(out)
    if resume and (finished := _finished(out, described)) is not None:
        return finished, []
    workspace = Workspace.open(out, described, overwrite=overwrite, resume=resume)
    opened.append(workspace)
    if workspace.is_done:
        return None, []
    workspace.check_space(_space(plan))
    pieces = Pieces(workspace.pieces)
    return None, [layer.index for layer in plan.layers if not pieces.has(layer)]


def _end(
    plan: Plan, out: Path, workspace: Workspace, report: RunReport, seconds: Callable[[], float]
) -> RunReport:
    """Put everything together and in its place."""
    if not workspace.is_done:
        assemble(plan, workspace, report, out, seconds)
        if plan.checkpoint.identity() != report.run["input"]:
            raise InputError(f"{plan.checkpoint.folder} was changed while it was read")
        workspace.finish()
    report = RunReport.read(workspace.root / "done")
    workspace.publish()
    return report


@contextmanager
def _closed_on_error(opened: list[Workspace]) -> Iterator[None]:
    """Close the workspace where something fails: removed if the input is at fault, or nothing is finished."""
    try:
        yield
    except InputError:
        for workspace in opened:
            workspace.close(remove=True)
        raise
    except BaseException:
        for workspace in opened:
            kept = (
                workspace.is_done or any(workspace.pieces.glob("*.done")) or any(workspace.result.iterdir())
            )
            workspace.close(remove=not kept)
        raise


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )


def _finished(out: Path, described: dict[str, Any]) -> RunReport | None:
    """The report of ``out`` if the same run has already made it."""
    try:
        report = RunReport.read(out)
    except (InputError, OSError):
        return None
    return report if json.loads(dumps(described)) == report.run else None


def _space(plan: Plan) -> int:
    """Bytes on disk that the run needs: the output, the shard being written and the adapter twice."""
    weights = sum(_sizes(plan).values())
    return weights + min(plan.options.max_shard_size, weights) + 2 * plan.adapter_bytes(*plan.layers)


def _sizes(plan: Plan) -> dict[str, int]:
    """Bytes that each tensor on disk becomes, by its name, in natural order."""
    sizes = {entry.name: plan.rest_bytes(entry) for entry in plan.rest}
    sizes |= {layer.entry.name: plan.layer_bytes(layer) + TABLE_BYTES for layer in plan.layers}
    return {name: sizes[name] for name in sorted(sizes, key=natural_order)}


def _calibration_notes(calibration: Calibration | None) -> tuple[str, ...]:
    if calibration is None:
        return ()
    facts = calibration.summary()
    return (
        f"calibrated on {facts['tokens']} tokens in {facts['windows']} windows, {facts['seconds']:.0f} s "
        f"({facts['mode']}); {len(facts['not_usable'])} of {facts['layers']} layers without a second moment",
        *calibration.notes,
    )


def _write_weights(
    plan: Plan,
    root: Path,
    unsolved: list[int],
    device: torch.device,
    progress: Progress | None,
    calibration: Calibration | None,
    told: Collection[int] = (),
) -> float:
    """Solve what is not solved yet and write every shard that is not written yet; seconds of earlier runs.

    Layers whose numbers are in ``told`` are solved, and their time is counted elsewhere. Several processes
    solve the layers of a shard together; then the first writes it while the others go on.
    """
    here = world()
    pieces, result = Pieces(root / "pieces"), root / "result"
    report = progress if progress is not None and here.is_main else lambda *_: None
    earlier = 0.0
    for layer in plan.layers:
        if layer.index not in unsolved and layer.index not in told:
            facts, _ = pieces.facts(layer)
            earlier += facts.seconds
            report(facts, True)
    by_name = {layer.entry.name: layer for layer in plan.layers}
    sizes = _sizes(plan)
    runs = split_shards(list(sizes.values()), plan.options.max_shard_size)
    names = list(sizes)
    work = [
        ([names[position] for position in run_], file_name)
        for run_, file_name in zip(runs, shard_names(len(runs)), strict=True)
        if not (result / file_name).exists()
    ]
    todo = [
        [by_name[name] for name in members if name in by_name and by_name[name].index in unsolved]
        for members, _ in work
    ]
    barrier()  # all have looked at what is there before the first file is added
    mine = _share(todo, here.rank, here.size)
    solved = _solve(plan, [layer for layers in mine for layer in layers], device, calibration)

    def write(members: list[str], file_name: str) -> None:
        layers = [by_name[name] for name in members if name in by_name]
        tensors: list[Any] = [
            rest_tensor(plan, plan.checkpoint.tensors[n]) for n in members if n not in by_name
        ]
        for layer in layers:
            tensors += pieces.base(layer)
        temporary = pieces.folder / "shard.tmp"
        write_file(temporary, tensors, {"format": "pt"})
        rename_into_place(temporary, result / file_name)
        for layer in layers:
            pieces.drop_base(layer)

    def turn(number: int) -> None:
        """Write the shard before this one, solve this one's layers."""
        if number and here.is_main:
            write(*work[number - 1])
        for layer in mine[number] if number < len(work) else ():
            found = next(solved)
            pieces.put(layer, found)
            report(found.report, False)

    for number in range(len(work) + 1):
        together(lambda number=number: turn(number))  # type: ignore[misc]
        if here.is_main and number < len(work):
            for layer in todo[number]:
                if layer not in mine[number]:
                    report(pieces.facts(layer)[0], False)
    return earlier


def _share(todo: list[list[LayerPlan]], rank: int, size: int) -> list[list[LayerPlan]]:
    """The layers that process ``rank`` of ``size`` solves, shard by shard: the largest first, each to the
    process that has least; in their own order within a shard."""
    loads = [0] * size
    shares = []
    for layers in todo:
        taken = set()
        for layer in sorted(layers, key=lambda layer: (-layer.entry.numel, layer.index)):
            least = loads.index(min(loads))
            loads[least] += layer.entry.numel
            if least == rank:
                taken.add(layer.index)
        shares.append([layer for layer in layers if layer.index in taken])
    return shares


def _solve(
    plan: Plan, layers: list[LayerPlan], device: torch.device, calibration: Calibration | None
) -> Iterator[SolvedLayer]:
    """Solve in order, while a thread reads the next weight; or layers of one shape together, if asked."""
    if plan.options.together and calibration is None:
        yield from solve_ahead(plan, layers, device)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        upcoming = reader.submit(layers[0].entry.read) if layers else None
        for number, layer in enumerate(layers):
            assert upcoming is not None
            weight = upcoming.result()
            upcoming = reader.submit(layers[number + 1].entry.read) if number + 1 < len(layers) else None
            result = solve_layer(plan, layer, weight, device, calibration)
            del weight  # not held while the caller writes
            yield result
