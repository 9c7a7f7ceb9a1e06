"""What ``loftq-init`` will do to a checkpoint, decided and checked before anything is written."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from quant import QuantSpec
from quant.bnb_format import misread_on_cpu, why_not_bnb

from .architecture import Architecture, Home, ModuleInfo
from .checkpoint import Checkpoint, natural_order
from .config import LoraConfig
from .errors import InputError, did_you_mean
from .expert_plan import adapted_stacks, expert_layers, plan_experts
from .layer_plan import LayerPlan, plan_layer
from .options import InitOptions
from .safetensors_io import DTYPE_BITS, DTYPE_OF_STORED, FLOAT_DTYPES, STORED_DTYPE, TensorEntry
from .skip_modules import skip_modules
from .stored_expert import ExpertEntry
from .targets import (
    anchored,
    check_target_module_exists,
    condense,
    get_pattern_key,
    plan_targets,
    reads_past_forward,
)

SOLVABLE_KINDS = ("linear", "conv1d", "embedding")


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Attributes:
        checkpoint, architecture, options: The input.
        layers: Weights to quantise, in natural order of their names on disk.
        save_format: "bnb", "native" or "dense".
        dtype: Of the model that is written, torch's name.
        skip_modules: For bnb: what transformers must leave dense.
        target_modules: For adapter_config.json: matches exactly the layers with a rank.
        notes: What the user should know, a sentence each.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    options: InitOptions
    layers: tuple[LayerPlan, ...]
    save_format: str
    dtype: str
    skip_modules: tuple[str, ...]
    target_modules: Any
    notes: tuple[str, ...]

    @property
    def largest(self) -> LayerPlan:
        """The layer that decides how much memory is needed."""
        return max(self.layers, key=lambda layer: layer.numel)

    @property
    def rest(self) -> list[TensorEntry]:
        """The tensors on disk that no layer is made from."""
        taken: set[str] = set()
        for layer in self.layers:
            entry = layer.entry
            taken.update(entry.sources if isinstance(entry, ExpertEntry) else (entry.name,))
        return [entry for entry in self.checkpoint.tensors.values() if entry.name not in taken]

    def layer_bytes(self, layer: LayerPlan) -> int:
        """Bytes of a layer's weight as it will be saved (bitsandbytes' small tables not counted)."""
        if self.save_format == "dense":
            return layer.numel * DTYPE_BITS[STORED_DTYPE[self.dtype]] // 8
        return layer.spec.nbytes(layer.numel)

    def adapter_bytes(self, *layers: LayerPlan) -> int:
        """Bytes of the adapter's factors of the given layers."""
        element = DTYPE_BITS[STORED_DTYPE[self.options.adapter_dtype]] // 8
        return sum(layer.factor_bytes(element) for layer in layers)

    def rest_bytes(self, entry: TensorEntry) -> int:
        """Bytes of a tensor that is not quantised, as it will be saved."""
        return entry.numel * DTYPE_BITS[self.stored_dtype(entry)] // 8

    def stored_dtype(self, entry: TensorEntry) -> str:
        """The dtype (safetensors' name) in which a tensor that is not quantised is saved."""
        converts = self.options.dtype != "auto" or self.save_format == "dense"
        return STORED_DTYPE[self.dtype] if converts and entry.dtype in FLOAT_DTYPES else entry.dtype


def _model_dtype(checkpoint: Checkpoint, options: InitOptions, save_format: str) -> str:
    if options.dtype != "auto":
        return options.dtype
    found = DTYPE_OF_STORED[checkpoint.float_dtype]
    # A dense result is for consumers that know nothing of us: 16 bits, as they expect.
    return "float16" if save_format == "dense" and found == "float32" else found


def _lora_config(options: InitOptions) -> LoraConfig:
    targets, exclude = options.target_modules, options.exclude_modules
    return LoraConfig(
        r=options.rank,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        exclude_modules=(list(exclude) if isinstance(exclude, tuple) else exclude) or None,
    )


def _targets(architecture: Architecture, options: InitOptions) -> tuple[set[str], Any, list[str]]:
    """Paths of the modules that get an adapter, what names them in a LoraConfig, and notes."""
    modules = [(module.path, module.kind) for module in architecture.modules]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = plan_targets(
                _lora_config(options),
                modules,
                model_type=architecture.model_type,
                output_layers=architecture.heads,
            )
        except ValueError as error:
            wrong = "".join(f"; {note}" for note in _unused_names(architecture, options))
            raise InputError(f"{error} {_kinds_hint(architecture)}".strip() + wrong) from error
    unused = _unused_names(architecture, options)
    # PEFT's words for an exclusion without effect say less than the note that names it.
    said = [str(w.message) for w in caught if not (unused and "exclude_modules" in str(w.message))]
    notes = said + unused
    return set(found.targeted), found.target_modules, notes


def _kinds_hint(architecture: Architecture) -> str:
    names = _last_names(architecture)
    return f"(this model has {', '.join(names)})" if names else ""


def _last_names(architecture: Architecture) -> list[str]:
    return list(dict.fromkeys(path.rpartition(".")[2] for path in _solvable(architecture)))


def _unused_names(architecture: Architecture, options: InitOptions) -> list[str]:
    """Names among the targets and exclusions that are no module's: PEFT passes over them in silence."""
    paths = [module.path for module in architecture.modules]
    return [
        f"--{option} '{name}' is no module of this model{did_you_mean(name, _last_names(architecture))}"
        for option, names in (
            ("target-modules", options.target_modules),
            ("exclude-modules", options.exclude_modules),
        )
        if isinstance(names, tuple)
        for name in names
        if not any(f".{path}".endswith(f".{name}") for path in paths)
    ]


def _solvable(architecture: Architecture) -> list[str]:
    return [module.path for module in architecture.modules if module.kind in SOLVABLE_KINDS]


def _rest(architecture: Architecture) -> set[str]:
    """Paths of what ``quantize_rest`` adds: every Linear that no head is and whose forward is what runs."""
    return {
        module.path
        for module in architecture.modules
        if module.kind in ("linear", "conv1d")
        and module.path not in architecture.heads
        and not reads_past_forward(architecture.model_type, module.path)
    }


def _check_dense(checkpoint: Checkpoint) -> None:
    if method := checkpoint.config.get("quantization_config"):
        method = method.get("quant_method", method) if isinstance(method, dict) else method
        raise InputError(
            f"{checkpoint.folder} is quantised already ({method!r:.60}); give the original checkpoint"
        )


def _check_untied(architecture: Architecture, targeted: Iterable[str]) -> None:
    for path in targeted:
        if f"{path}.weight" in architecture.tied:
            others = sorted(name.removesuffix(".weight") for name in architecture.tied - {f"{path}.weight"})
            raise InputError(
                f"'{path}' shares its weight with {', '.join(others)}, and quantising it would change both; "
                "exclude it with --exclude-modules"
            )


def _locate(
    checkpoint: Checkpoint, homes: dict[str, Home], chosen: Iterable[ModuleInfo]
) -> tuple[dict[str, TensorEntry], list[str]]:
    """The tensor of each chosen module, and the modules whose weight is made from several tensors."""
    direct = {home.parameter: checkpoint.tensors[key] for key, home in homes.items() if not home.converted}
    converted = {home.parameter for home in homes.values() if home.converted}
    found, left = {}, []
    for module in chosen:
        name = f"{module.path}.weight"
        if name in direct:
            found[module.path] = _checked(direct[name], module)
        elif name in converted:
            left.append(module.path)
        else:
            raise InputError(f"{checkpoint.folder} lacks the tensor '{name}' that config.json calls for")
    return found, left


def _checked(entry: TensorEntry, module: ModuleInfo) -> TensorEntry:
    shape = module.shape[::-1] if module.kind == "conv1d" else module.shape
    if entry.shape != shape:
        raise InputError(
            f"{entry.path}: '{entry.name}' has shape {entry.shape}, config.json calls for {shape}"
        )
    if entry.dtype not in FLOAT_DTYPES:
        raise InputError(
            f"{entry.path}: '{entry.name}' has dtype {entry.dtype}; only {', '.join(FLOAT_DTYPES)} weights "
            "can be quantised"
        )
    return entry


def _fused_note(checkpoint: Checkpoint, architecture: Architecture, homes: dict[str, Home]) -> list[str]:
    """Mixture-of-experts weights, which are one stacked parameter in memory, whatever they are on disk."""
    stacked = {
        name
        for name, shape in architecture.parameters.items()
        if len(shape) == 3 and not name.endswith((".weight", ".bias"))
    }
    keys = [key for key, home in homes.items() if home.converted or home.parameter in stacked]
    if not keys:
        return []
    count = sum(checkpoint.tensors[key].numel for key in keys)
    return [
        f"{len(keys)} tensors with {count:,} weights belong to fused or stacked parameters (experts) and "
        f"stay as they are, e.g. '{keys[0]}'; --quantize-experts quantises them, for this engine's loader"
    ]


def _save_format(
    options: InitOptions, specs: dict[str, QuantSpec], kinds: dict[str, str]
) -> tuple[str, str | None]:
    """The format to save in, and why it is not bnb where that was left open."""
    why = next((reason for path in specs if (reason := why_not_bnb(specs[path]))), None)
    embedding = next((path for path, kind in kinds.items() if kind == "embedding"), None)
    if why is None and embedding is not None:
        why = f"bitsandbytes holds no embeddings, and '{embedding}' is one"
    if options.save_format == "bnb" and why is not None:
        raise InputError(f"--save-format bnb: {why}; choose --save-format native or dense")
    if options.save_format != "auto":
        return options.save_format, None
    return ("bnb", None) if why is None else ("native", why)


def _target_modules(architecture: Architecture, given: Any, adapted: set[str]) -> Any:
    """``given`` if PEFT would find exactly ``adapted`` with it, otherwise the shortest names that do."""
    paths = [module.path for module in architecture.modules]
    for candidate in (given, condense(set(adapted), paths)):
        config = LoraConfig(target_modules=candidate)
        if {path for path in paths if check_target_module_exists(config, path)} == adapted:
            return sorted(candidate) if isinstance(candidate, (set, list)) else candidate
    return sorted(adapted)


def make_plan(checkpoint: Checkpoint, architecture: Architecture, options: InitOptions) -> Plan:
    """Decide what happens to every tensor.

    Raises:
        InputError: already quantised, nothing matches, a rank too large, a tied or missing weight, shapes
            that contradict config.json, a save format that cannot hold what was asked for.
    """
    _check_dense(checkpoint)
    adapted, given, notes = _targets(architecture, options)
    _check_untied(architecture, adapted)
    homes = architecture.homes(checkpoint.tensors)
    chosen = adapted | (_rest(architecture) if options.quantize_rest else set())
    modules = [module for module in architecture.modules if module.path in chosen]
    entries, left = _locate(checkpoint, homes, modules)
    if left:
        notes.append(
            f"{len(left)} Linears are put together from several tensors and stay dense, e.g. '{left[0]}'"
        )
    modules = sorted(
        (module for module in modules if module.path in entries),
        key=lambda module: natural_order(entries[module.path].name),
    )
    patterns = list(options.bits_pattern)
    specs = {m.path: options.spec_for(get_pattern_key(patterns, m.path)) for m in modules}
    save_format, why_native = _save_format(options, specs, {m.path: m.kind for m in modules})
    if why_native is not None:
        notes.append(f"saved in the native format: {why_native}")
    experts, about_experts = plan_experts(checkpoint, architecture, options, save_format == "native")
    if experts and save_format == "bnb":
        save_format = "native"
        notes.append("saved in the native format: quantised experts have no other")
    notes += about_experts or _fused_note(checkpoint, architecture, homes)
    if save_format == "bnb":
        stuck = [module.path for module in modules if not module.stock_4bit]
        if stuck:
            notes.append(
                f"{len(stuck)} modules stay dense, because transformers does not load them in 4 bits, e.g. "
                f"'{stuck[0]}' (--save-format native or dense has no such limit)"
            )
        modules = [module for module in modules if module.stock_4bit]
    adapted &= {module.path for module in modules}
    if not adapted:
        raise InputError(f"nothing is left to adapt: {'; '.join(notes)}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layers = tuple(
            plan_layer(index, m, entries[m.path], specs[m.path], options, is_adapted=m.path in adapted)
            for index, m in enumerate(modules)
        )
        stacks = adapted_stacks(architecture, options, experts)
        layers += expert_layers(len(layers), experts, stacks, options)
    notes += [str(warning.message) for warning in caught[:1]]  # the same key would warn for every layer
    names = [layer.path for layer in layers] + sorted({layer.stack for layer in layers if layer.stack})
    notes += _unused_patterns(options, names)
    notes += _misread_note(layers) if save_format == "bnb" else []
    quantised = {module.path for module in modules}
    return Plan(
        checkpoint=checkpoint,
        architecture=architecture,
        options=options,
        layers=layers,
        save_format=save_format,
        dtype=_model_dtype(checkpoint, options, save_format),
        skip_modules=skip_modules(architecture, quantised) if save_format == "bnb" else (),
        target_modules=_target_modules(architecture, given, adapted),
        notes=tuple(notes),
    )


def _misread_note(layers: Sequence[LayerPlan]) -> list[str]:
    wrong = [layer for layer in layers if misread_on_cpu(layer.spec, layer.module.shape)]
    if not wrong:
        return []
    return [
        f"{len(wrong)} layers have rows that are no multiple of their block, e.g. '{wrong[0].path}': "
        "bitsandbytes reads them wrongly on a CPU with AVX-512 (not on others, nor on a GPU); a --block-size "
        f"that divides {wrong[0].module.shape[1]} avoids it"
    ]


def _unused_patterns(options: InitOptions, paths: Sequence[str]) -> list[str]:
    given = {
        "bits-pattern": options.bits_pattern,
        "rank-pattern": options.rank_pattern,
        "alpha-pattern": options.alpha_pattern,
    }
    return [
        f"--{option} '{key}' matches no quantised module"
        f"{did_you_mean(key, dict.fromkeys(path.rpartition('.')[2] for path in paths))}"
        for option, patterns in given.items()
        for key in patterns
        if not any(anchored(key).match(path) for path in paths)
    ]
