"""What ``qlora-merge`` will make of every tensor, decided and checked before anything is written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from quant.bnb_format import why_not_bnb

from .base_on_disk import DiskBase, StoredWeight
from .checkpoint import natural_order
from .disk_adapter import DiskAdapter, ModulePart, read_codes_hash
from .errors import InputError
from .expert_layout import Slab, is_stored_in_out
from .merge_job import Job
from .merge_options import MergeOptions
from .safetensors_io import DTYPE_OF_STORED, FLOAT_DTYPES, STORED_DTYPE, TensorEntry

# Model classes that put a head of their own on a base, by PEFT's task type: a mapping of transformers'.
_HEAD_CLASSES = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}


@dataclass(frozen=True)
class MergePlan:
    """Everything that will be written.

    Attributes:
        base, adapter, options: The input.
        jobs: In natural order of their names.
        save_format: "dense", "bnb" or "native".
        config_changes: Keys of config.json and their new values.
        notes: What the user should know, a sentence each.
        vocabulary_changed: The adapter brings its own tokenizer.
    """

    base: DiskBase
    adapter: DiskAdapter
    options: MergeOptions
    jobs: tuple[Job, ...]
    save_format: str
    config_changes: dict[str, Any]
    notes: tuple[str, ...]
    vocabulary_changed: bool

    @property
    def dtype(self) -> str:
        """torch's name of the model's dtype."""
        return self.base.dtype if self.options.dtype == "auto" else self.options.dtype

    @property
    def largest(self) -> Job:
        """The job that decides how much memory is needed."""
        return max(self.jobs, key=lambda job: job.numel_at_once if job.kind != "copy" else 0)


def make_merge_plan(base: DiskBase, adapter: DiskAdapter, options: MergeOptions) -> MergePlan:
    """Decide what happens to every tensor.

    Raises:
        InputError: the adapter is for another model: a module that this one does not have, or shapes that
            differ; or it adapts what cannot be merged on disk.
    """
    planner = _Planner(base, adapter, options)
    jobs = planner.jobs()
    quantised = [job for job in jobs if job.kind == "quantise"]
    return MergePlan(
        base=base,
        adapter=planner.adapter,
        options=options,
        jobs=tuple(sorted(jobs, key=lambda job: natural_order(job.name))),
        save_format=_save_format(quantised),
        config_changes=planner.config_changes,
        notes=tuple(planner.notes),
        vocabulary_changed=planner.vocabulary_changed,
    )


def _save_format(quantised: list[Job]) -> str:
    if not quantised:
        return "dense"
    for job in quantised:
        module = job.stored.module if job.stored is not None else None
        if module is None or not module.stock_4bit or (job.spec is not None and why_not_bnb(job.spec)):
            return "native"
    return "bnb"


class _Planner:
    """Collects jobs, notes and changes of the config."""

    def __init__(self, base: DiskBase, adapter: DiskAdapter, options: MergeOptions) -> None:
        self.base, self.options = base, options
        self.adapter = adapter = adapter.placed(
            base.architecture.parameters, lambda path: is_stored_in_out(base.architecture, path)
        )
        self.stacked = {slab.parameter for slab in base.slabs.values()} | set(base.experts)
        self.notes: list[str] = []
        self.config_changes: dict[str, Any] = {}
        self.vocabulary_changed = False
        self.replaced = dict(adapter.replaced)
        self.vocabulary = self._of_vocabulary()
        for name in self.replaced:
            self._check_replacement(name)
        self._check_vocabulary()
        self.parts = {self._parameter(path, part): part for path, part in adapter.parts.items()}
        self._compare_fingerprints()
        for name in self.adapter.config.target_parameters or ():
            if not any(f".{parameter}".endswith(f".{name}") for parameter in base.architecture.parameters):
                self._note(f"target_parameters: '{name}' is no Parameter of {base.architecture.class_name}")

    # ---- checks

    def _compare_fingerprints(self) -> None:
        theirs, ours = self.adapter.fingerprint_of_base(), read_codes_hash(self.base.checkpoint.folder)
        if theirs is not None and ours is not None and theirs != ours:
            self.notes.append(
                f"{self.adapter.folder} was made for another quantised base than "
                f"{self.base.checkpoint.folder}: their fingerprints differ"
            )
        elif theirs is not None and ours is None:
            self.notes.append(
                f"{self.adapter.folder} was made for a quantised base and corrects its error; "
                f"{self.base.checkpoint.folder} has no fingerprint and may not be it"
            )

    def _parameter(self, path: str, part: ModulePart) -> str:
        """The parameter, or the tensor on disk, that ``part`` changes; raises if it does not fit there."""
        name = f"{part.path}.{part.parameter}"
        architecture, folder = self.base.architecture, self.base.checkpoint.folder
        parameters = architecture.parameters
        if name in self.base.fused and name not in self.stacked:
            raise InputError(
                f"the adapter adapts '{name}', which is put together from several tensors on disk in a way "
                "that is not known here; merge it in Python with merge_and_unload()"
            )
        if part.as_stored:
            return name  # its shapes were checked when it was placed
        if name not in parameters and (home := architecture.homes([name]).get(name)) is not None:
            if name in self.base.slabs and home.parameter in self.stacked:  # one expert's, as on the disk
                self._check_shapes(path, self.base.slabs[name].shape(parameters[home.parameter]))
                return name
            if home.parameter in self.stacked:
                raise InputError(
                    f"{self.adapter.folder} adapts '{path}', one expert of '{home.parameter}', and {folder} "
                    "has no tensor of that expert alone; load both in Python and merge with "
                    "merge_and_unload()"
                )
            name = home.parameter if not home.converted else name
        if name not in parameters:
            below = any(p.startswith(f"{path}.") for p in parameters)
            what = "is no module with a weight" if below else "is not there"
            raise InputError(
                f"{self.adapter.folder} adapts '{path}', which {what} in {architecture.class_name} of "
                f"{folder}: is it an adapter for another model?"
            )
        self._check_shapes(path, parameters[name])
        return name

    def _check_shapes(self, path: str, shape: tuple[int, ...]) -> None:
        part = self.adapter.parts[path]
        tokens = part.tokens
        if tokens is not None and (
            tokens.shape[1:] != shape[1:] or max(part.token_indices, default=0) >= shape[0]
        ):
            raise InputError(f"'{tokens.name}' {tokens.shape} has no place in '{path}' {shape}")
        if part.A is None or part.B is None:
            return
        kinds = {module.path: module.kind for module in self.base.architecture.modules}
        expected: tuple[tuple[int, ...], tuple[int, ...]]
        if part.embedding or kinds.get(path) == "conv1d":
            expected = ((part.rank, shape[0]), (shape[1], part.rank))
        else:
            expected = ((part.rank, *shape[1:]), (shape[0], part.rank, *(1 for _ in shape[2:])))
        if (part.A.shape, part.B.shape) != expected:
            raise InputError(
                f"the adapter of '{path}' has A {part.A.shape} and B {part.B.shape}; its weight {shape} "
                f"needs {expected[0]} and {expected[1]}"
            )

    def _check_replacement(self, parameter: str) -> None:
        entry, shape = self.replaced[parameter], self.base.architecture.parameters.get(parameter)
        if parameter in self.base.fused:
            raise InputError(
                f"the adapter replaces '{parameter}', which is put together from several tensors on disk; "
                "merge it in Python with merge_and_unload()"
            )
        if shape is None or entry.shape == shape:
            return
        if parameter not in self.vocabulary or entry.shape[1:] != shape[1:]:
            raise InputError(
                f"the adapter's '{entry.name}' has shape {entry.shape}, the model has {shape} there"
            )
        if len(shape) == 2:
            self.config_changes["vocab_size"] = entry.shape[0]
            self.vocabulary_changed = True

    def _of_vocabulary(self) -> dict[str, int]:
        """Parameters of embeddings and heads that have a row for every token, and how many these are."""
        architecture = self.base.architecture
        size = getattr(architecture._model.config, "vocab_size", None)
        paths = [module.path for module in architecture.modules if module.kind == "embedding"]
        names = [f"{path}.{kind}" for path in (*paths, *architecture.heads) for kind in ("weight", "bias")]
        shapes = {name: architecture.parameters[name] for name in names if name in architecture.parameters}
        return {name: shape[0] for name, shape in shapes.items() if shape[0] == size}

    def _check_vocabulary(self) -> None:
        """Refuse an adapter that changes the number of tokens of the embedding or the head alone."""
        size = self.config_changes.get("vocab_size")
        if size is None:
            return
        replaced = {name: self.replaced[name].shape[0] for name in self.vocabulary if name in self.replaced}
        grown = next(name for name, rows in replaced.items() if rows == size)
        for name, rows in (self.vocabulary | replaced).items():
            if rows != size:
                raise InputError(
                    f"{self.adapter.folder} has '{grown}' for {size} tokens, and '{name}' would be for "
                    f"{rows}; save the adapter with both (save_embedding_layers=True)"
                )

    # ---- jobs

    def jobs(self) -> list[Job]:
        """All of them, in any order."""
        self._add_heads()
        jobs = [self._kept(entry) for entry in self.base.kept]
        for parameter, experts in self.base.experts.items():
            jobs += self._quantised_experts(parameter, experts)
        stored = dict(self.base.weights)
        self._untie(stored)
        for name in (*self.parts, *self.replaced):
            if name in stored or self.base.find(name) is not None:
                continue  # the latter: tied, and stored under its other name
            if name in self.base.fused or name in self.base.slabs or name in self.base.experts:
                continue  # tensors of experts, among those that are kept
            if name not in self.replaced:
                raise InputError(f"{self.base.checkpoint.folder} lacks the tensor '{name}'")
            entry = self.replaced[name]
            stored[name] = StoredWeight(name, {name: entry}, "dense", None, None, self.base.dtype)
        jobs += [self._job(parameter, weight) for parameter, weight in stored.items()]
        biases = {f"{path}.bias" for path, part in self.adapter.parts.items() if part.bias is not None}
        if lacking := sorted(biases - stored.keys()):
            raise InputError(f"the adapter adds to '{lacking[0]}', and the base has no such bias")
        return jobs

    def _kept(self, entry: TensorEntry) -> Job:
        """A tensor that is no parameter by itself: an expert's matrix, or something unknown."""
        slab = self.base.slabs.get(entry.name)
        part = self.parts.get(entry.name)
        if part is None and slab is not None:
            part = self.parts.get(slab.parameter)
        if part is None:
            return self._copy(entry.name, entry)
        dtype = DTYPE_OF_STORED.get(entry.dtype, "float32")  # others are refused
        return self._merge(StoredWeight(entry.name, {entry.name: entry}, "dense", None, None, dtype), part)

    def _quantised_experts(self, parameter: str, experts: tuple[StoredWeight, ...]) -> list[Job]:
        """One dense tensor, as the model has it; or every expert quantised, with its codes if it stays."""
        shape, part = self.base.architecture.parameters[parameter], self.parts.get(parameter)
        if self.options.requantize is None:
            self._note(
                "experts are written stacked, one tensor a Parameter, as transformers has them in memory"
            )
            slab = Slab(parameter, None, 0, shape[1])
            kind, dtype = "dequantise" if part is None else "merge", self._dtype(experts[0])
            return [Job(parameter, kind, dtype, shape, part=part, slab=slab, experts=experts)]
        jobs = []
        for number, stored in enumerate(experts):
            slab = Slab(parameter, number, 0, shape[1])
            spec = stored.spec if part is None else self.options.spec
            job = Job(stored.name, "quantise", "U8", stored.shape, stored, part=part, spec=spec, slab=slab)
            jobs.append(dataclasses.replace(job, keep_codes=part is None))
        return jobs

    def _job(self, parameter: str, stored: StoredWeight) -> Job:
        if parameter in self.replaced:
            entries = {stored.name: self.replaced[parameter]}
            stored = dataclasses.replace(stored, entries=entries, method="dense", spec=None)
        if parameter in self.parts:
            return self._merge(stored, self.parts[parameter])
        owner = self.parts.get(f"{parameter.removesuffix('.bias')}.weight")
        dtype = self._dtype(stored)
        if parameter.endswith(".bias") and owner is not None and owner.bias is not None:
            return Job(stored.name, "merge", dtype, stored.shape, stored=stored, part=owner, bias=True)
        if not stored.is_quantised:
            entry = stored.entries[stored.name]
            keeps = self.options.dtype == "auto" and parameter not in self.replaced
            return self._copy(stored.name, entry, entry.dtype if keeps else dtype)
        if self.options.requantize is None:
            return Job(stored.name, "dequantise", dtype, stored.shape, stored=stored)
        spec = stored.quantized().spec if stored.spec is None else stored.spec
        return Job(stored.name, "quantise", "U8", stored.shape, stored=stored, spec=spec, keep_codes=True)

    def _merge(self, stored: StoredWeight, part: ModulePart) -> Job:
        if not stored.is_quantised and stored.entries[stored.name].dtype not in FLOAT_DTYPES:
            raise InputError(
                f"'{stored.name}' has dtype {stored.entries[stored.name].dtype}; "
                f"only {', '.join(FLOAT_DTYPES)} can be merged"
            )
        slab = self.base.slabs.get(stored.name)
        if slab is not None:
            if self.options.requantize is not None:
                self._note("stacked experts are merged and stay dense: --requantize is for Linears")
            slab = slab if part.experts else None
            return Job(stored.name, "merge", self._dtype(stored), stored.shape, stored, part=part, slab=slab)
        linear = stored.module is not None and stored.module.kind in ("linear", "conv1d")
        if self.options.requantize is not None and part.A is not None and (linear or stored.is_quantised):
            spec = self.options.spec
            return Job(stored.name, "quantise", "U8", stored.shape, stored=stored, part=part, spec=spec)
        return Job(stored.name, "merge", self._dtype(stored), stored.shape, stored=stored, part=part)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _copy(self, name: str, entry: TensorEntry, dtype: str | None = None) -> Job:
        if entry.dtype not in FLOAT_DTYPES:
            dtype = entry.dtype
        elif dtype is None:
            dtype = entry.dtype if self.options.dtype == "auto" else STORED_DTYPE[self.options.dtype]
        return Job(name, "copy", dtype, entry.shape, entry=entry)

    def _dtype(self, stored: StoredWeight) -> str:
        return STORED_DTYPE[stored.dtype if self.options.dtype == "auto" else self.options.dtype]

    # ---- ties and heads

    def _untie(self, stored: dict[str, StoredWeight]) -> None:
        """Give a tensor of their own to tied parameters that the adapter does not change together."""
        for parameter in [*self.parts, *self.replaced]:
            group = self.base.tied_with(parameter)
            source = self.base.find(parameter)
            if len(group) < 2 or source is None or self._moves_together(parameter, group):
                continue
            heads = {f"{path}.weight" for path in self.base.architecture.heads}
            if len(group) > 2 or not group & heads or source.is_quantised:
                raise InputError(
                    f"'{parameter}' shares its weight with {', '.join(sorted(group - {parameter}))}, and "
                    "the adapter changes it alone; merge it in Python with merge_and_unload()"
                )
            for name in group - stored.keys():
                stored[name] = dataclasses.replace(
                    source, name=name, entries={name: source.entries[source.name]}
                )
            self.config_changes["tie_word_embeddings"] = False
            self._note("the adapter changes the embedding or the head alone: they are not tied in the result")

    def _moves_together(self, parameter: str, group: set[str]) -> bool:
        """Whether the tie holds after the merge: token rows and tied adapters go to all members alike."""
        adapted = [name for name in group if name in self.parts and self.parts[name].A is not None]
        if self.adapter.config.ensure_weight_tying:
            return True
        if adapted:
            return False
        entries = [self.replaced.get(name) for name in sorted(group)]
        if any(entry is None for entry in entries):
            return parameter not in self.replaced
        first, *rest = [entry.read() for entry in entries if entry is not None]
        return all(first.shape == other.shape and bool((first == other).all()) for other in rest)

    def _add_heads(self) -> None:
        """Tensors of a head that the base's class does not have make the result a model of another class."""
        unknown = [name for name in self.replaced if name not in self.base.architecture.parameters]
        unknown = [name for name in unknown if name not in self.base.fused]
        if not unknown:
            return
        task = str(self.adapter.config.task_type or "")
        mapping = _HEAD_CLASSES.get(task.rpartition(".")[2])
        if mapping is None:
            raise InputError(
                f"the adapter has a tensor for '{unknown[0]}', which {self.base.architecture.class_name} "
                "does not have"
            )
        from transformers.models.auto import modeling_auto

        names = getattr(modeling_auto, mapping)
        name = names.get(self.base.architecture.model_type)
        if name is None:
            raise InputError(
                f"transformers has no class for {task} on {self.base.architecture.model_type} models"
            )
        self.config_changes["architectures"] = [name]
        rows = next((self.replaced[n].shape[0] for n in unknown if n.endswith(".weight")), None)
        if rows is not None and task.rpartition(".")[2] != "QUESTION_ANS":
            self.config_changes["id2label"] = {str(i): f"LABEL_{i}" for i in range(rows)}
            self.config_changes["label2id"] = {f"LABEL_{i}": i for i in range(rows)}
        self.notes.append(f"the adapter brings its own head, so the result is a {name}")
