"""``qlora-merge`` over a checkpoint: one weight in memory at a time, and the output appears in one step."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .architecture import ModuleInfo
from .checkpoint import CONFIG_FILE, index_weights, shard_names, split_shards
from .errors import InputError
from .files import copy_file, read_json_object, rename_into_place, write_json
from .fingerprint import FINGERPRINT_FILE, Fingerprint, module_digest
from .layer_plan import LayerPlan
from .merge_job import Job
from .merge_plan import MergePlan
from .merge_worker import LazyTensor, MergedLayer, Progress, Worker
from .options import InitOptions
from .peak_memory import peak_memory
from .plan import Plan
from .report import versions
from .safetensors_io import TensorEntry, Writable, read_header, write_file
from .serialise import TABLE_BYTES, ConvertedTensor, layer_tensors, model_config
from .skip_modules import skip_modules
from .workspace import Workspace, check_apart

REPORT_FILE = "merge_report.json"


@dataclass(frozen=True)
class MergeReport:
    """A whole merge.

    Attributes:
        run: Options and input, as they decide the output's bytes.
        layers: Of every weight that the adapter changes.
        save_format, dtype: Of the result.
        notes: Sentences for the user.
        bytes_in, bytes_out: Of the weight files.
        seconds, peak_rss: What it took.
        versions: Of the software.
    """

    run: dict[str, Any]
    layers: tuple[MergedLayer, ...]
    save_format: str
    dtype: str
    notes: tuple[str, ...]
    bytes_in: int
    bytes_out: int
    seconds: float
    peak_rss: int
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields."""
        return dataclasses.asdict(self) | {"layers": [layer.to_json() for layer in self.layers]}


def describe_merge(plan: MergePlan) -> dict[str, Any]:
    """What decides the output's bytes, JSON-able: a resumed run must have the same."""
    weights = plan.adapter.folder / "adapter_model.safetensors"
    facts = {name: (plan.adapter.folder / name).stat() for name in (weights.name, "adapter_config.json")}
    return {
        "options": plan.options.to_dict(),
        "input": plan.base.checkpoint.identity(),
        "adapter": {name: f"{stat.st_size} {stat.st_mtime_ns}" for name, stat in facts.items()},
        "version": versions()["qlora-engine"],
    }


def run_merge(
    plan: MergePlan,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Carry out ``plan`` and put the result into ``out`` in one step.

    Args:
        plan: From ``make_merge_plan``.
        out: Folder to write; see ``Workspace.open`` for what may be there.
        overwrite: Replace ``out`` once the new output is whole.
        resume: Go on with an interrupted run: finished weight files are kept. Returns at once if ``out`` is
            what this run would make.
        progress: Called after each weight that the adapter changes, with whether an earlier run did it.

    Raises:
        InputError: what is there cannot be replaced or resumed, or the result is not finite or does not fit
            its dtype. No trace is left.
        OSError: disk full, a file vanished, ... Finished weight files are kept for ``resume``.
    """
    began = time.perf_counter()
    described = describe_merge(plan)
    check_apart(out, plan.base.checkpoint.folder, "model")
    check_apart(out, plan.adapter.folder, "adapter")
    list(plan.base.checkpoint.side_files())  # refuses links that lead out of the folder
    Workspace.tidy(out)
    if resume and (finished := _finished(out, described)) is not None:
        return finished
    workspace = Workspace.open(out, described, overwrite=overwrite, resume=resume)
    try:
        if not workspace.is_done:
            workspace.check_space(sum(job.nbytes for job in plan.jobs))
            layers = _write_shards(plan, workspace, progress)
            _assemble(plan, workspace, described, layers, began)
            if describe_merge(plan) != described:
                raise InputError("the model or the adapter was changed while it was read")
            workspace.finish()
        report = _read_report(workspace.root / "done")
        workspace.publish()
        return report
    except InputError:
        workspace.close(remove=True)
        raise
    except BaseException:
        workspace.close(remove=not workspace.is_done and not any(workspace.result.iterdir()))
        raise


def _finished(out: Path, described: dict[str, Any]) -> MergeReport | None:
    """The report of ``out`` if the same run has already made it."""
    try:
        report = _read_report(out)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if report.run == json.loads(json.dumps(described)) else None


def _write_shards(plan: MergePlan, workspace: Workspace, progress: Progress | None) -> list[MergedLayer]:
    """Write every weight file that is not there yet; what was merged into which lies beside as JSON."""
    quantising = _quantising_plan(plan)
    sizes = [job.nbytes + (TABLE_BYTES if job.kind == "quantise" else 0) for job in plan.jobs]
    runs = split_shards(sizes, plan.options.max_shard_size)
    layers: list[MergedLayer] = []
    for positions, file_name in zip(runs, shard_names(len(runs)), strict=True):
        notes = workspace.pieces / f"{file_name}.json"
        if (workspace.result / file_name).exists():
            for record in _read_records(notes):
                layers.append(record)
                if progress is not None:
                    progress(record, True)
            continue
        worker = Worker(plan, progress)
        temporary = workspace.pieces / "shard.tmp"
        jobs = [plan.jobs[position] for position in positions]
        digests = _write_shard(jobs, worker, quantising, temporary, workspace.pieces)
        write_json(notes, {"layers": [record.to_json() for record in worker.records], "digests": digests})
        rename_into_place(temporary, workspace.result / file_name)
        layers += worker.records
    return layers


def _write_shard(
    jobs: Iterable[Job], worker: Worker, quantising: Plan | None, path: Path, pieces: Path
) -> dict[str, str]:
    """One weight file; the digests of its quantised weights by module path."""
    tensors: list[Writable] = []
    digests: dict[str, str] = {}
    made: list[Path] = []
    for number, job in enumerate(jobs):
        if job.kind == "copy":
            assert job.entry is not None
            tensors.append(_copied(job))
        elif job.kind != "quantise":
            tensors.append(LazyTensor(job, worker))
        else:
            assert quantising is not None
            layer = _layer_plan(number, job)
            q, record = worker.quantised(job)
            piece = pieces / f"{number:05d}.piece"
            write_file(piece, layer_tensors(quantising, layer, q))
            tensors += read_header(piece)[0].values()
            made.append(piece)
            digests[layer.path] = module_digest(q)
            del q
            if record is not None:
                worker.note(record)
    write_file(path, tensors, {"format": "pt"})
    for piece in made:
        piece.unlink()
    return digests


def _copied(job: Job) -> Writable:
    """A tensor of the base or the adapter, under the job's name and in its dtype."""
    assert job.entry is not None
    entry = dataclasses.replace(job.entry, name=job.name)
    return entry if job.dtype == entry.dtype else ConvertedTensor(entry, job.dtype)


def _read_records(path: Path) -> list[MergedLayer]:
    try:
        found = read_json_object(path)["layers"]
        return [MergedLayer(**{**values, "shape": tuple(values["shape"])}) for values in found]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error!r}") from error


def _read_report(folder: Path) -> MergeReport:
    values = read_json_object(folder / REPORT_FILE)
    layers = [MergedLayer(**{**layer, "shape": tuple(layer["shape"])}) for layer in values["layers"]]
    return MergeReport(**{**values, "layers": tuple(layers), "notes": tuple(values["notes"])})


# ---- a requantised result is written as loftq-init writes one


def _layer_plan(index: int, job: Job) -> LayerPlan:
    assert job.stored is not None
    assert job.spec is not None
    module = job.stored.module
    assert module is not None
    entry = TensorEntry(job.name, job.dtype, job.shape, Path(), 0, 0)
    return LayerPlan(index, module, entry, job.spec, rank=0, alpha=1, scaling=1.0)


def _quantising_plan(plan: MergePlan) -> Plan | None:
    jobs = [job for job in plan.jobs if job.kind == "quantise"]
    if not jobs:
        return None
    architecture = plan.base.architecture
    layers = tuple(_layer_plan(number, job) for number, job in enumerate(jobs))
    usual = next((job.spec for job in jobs if not job.keep_codes), jobs[0].spec)
    assert usual is not None
    return Plan(
        checkpoint=plan.base.checkpoint,
        architecture=architecture,
        options=InitOptions(
            format=usual.format, block_size=usual.block_size, double_quant=usual.double_quant
        ),
        layers=layers,
        save_format=plan.save_format,
        dtype=plan.dtype,
        skip_modules=skip_modules(architecture, {layer.path for layer in layers})
        if plan.save_format == "bnb"
        else (),
        target_modules=(),
        notes=(),
    )


def result_config(plan: MergePlan) -> dict[str, Any]:
    """config.json of the result: the base's, as the result is."""
    quantising = _quantising_plan(plan)
    if quantising is not None:
        config = model_config(quantising)
    else:
        config = {
            key: value for key, value in plan.base.checkpoint.config.items() if key != "quantization_config"
        }
        if plan.options.dtype != "auto":
            named = [key for key in ("dtype", "torch_dtype") if config.get(key) is not None] or ["dtype"]
            config |= dict.fromkeys(named, plan.dtype)
    return config | plan.config_changes


def _assemble(
    plan: MergePlan, workspace: Workspace, described: dict[str, Any], layers: list[MergedLayer], began: float
) -> None:
    """Everything of the output but the weight files."""
    result = workspace.result
    total = index_weights(result)
    write_json(result / CONFIG_FILE, result_config(plan))
    for folder, relative in _side_files(plan):
        (result / relative).parent.mkdir(parents=True, exist_ok=True)
        copy_file(folder / relative, result / relative)
    quantised: dict[str, ModuleInfo] = {}
    specs = {}
    for job in plan.jobs:
        if job.kind == "quantise" and job.stored is not None and job.stored.module is not None:
            quantised[job.stored.module.path] = job.stored.module
            specs[job.stored.module.path] = job.spec
    if quantised:
        digests: dict[str, str] = {}
        for path in workspace.pieces.glob("*.json"):
            digests |= read_json_object(path)["digests"]
        Fingerprint(specs=specs, digests=digests, compute_dtype=plan.dtype).write(result)  # type: ignore[arg-type]
    report = MergeReport(
        run=described,
        layers=tuple(layers),
        save_format=plan.save_format,
        dtype=plan.dtype,
        notes=plan.notes,
        bytes_in=plan.base.checkpoint.nbytes,
        bytes_out=total,
        seconds=time.perf_counter() - began,
        peak_rss=peak_memory(),
        versions=versions(),
    )
    write_json(result / REPORT_FILE, report.to_json())


def _side_files(plan: MergePlan) -> list[tuple[Path, Path]]:
    """(folder, relative path): the base's; if the vocabulary grew, the adapter's tokenizer files."""
    found = {relative: plan.base.checkpoint.folder for relative in plan.base.checkpoint.side_files()}
    found.pop(Path(FINGERPRINT_FILE), None)
    if plan.vocabulary_changed:
        found |= dict.fromkeys(plan.adapter.tokenizer_files(), plan.adapter.folder)
    return [(folder, relative) for relative, folder in found.items()]
