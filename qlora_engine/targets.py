"""Which modules a LoraConfig means: PEFT's matching rules, on a model or on names read from a checkpoint."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .target_defaults import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
DUMMY_TARGET_MODULES = "dummy-target-modules"
# Longer lists are condensed to suffixes: each target is compared with each module.
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
# State-space models whose kernels take these weights, not the modules: an adapter there would do nothing.
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_NOT_IN_MAMBA = ("out_proj", "conv1d")
_READ_PAST_FORWARD = dict.fromkeys(_MAMBA, ("out_proj",)) | dict.fromkeys(
    ("mamba", "falcon_mamba", "jamba"), ("x_proj", "dt_proj", "out_proj")
)
LINEAR_KINDS = ("linear", "conv1d")

Names = "list[str] | set[str] | str | None"


class PeftError(Exception):
    """An error of the adapter layer."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """A config matched no module and no parameter of the base model."""


class TargetConfig(Protocol):
    """The fields of LoraConfig that choose modules."""

    target_modules: Any
    exclude_modules: Any
    modules_to_save: Any
    layers_to_transform: Any
    layers_pattern: Any
    rank_pattern: Any
    alpha_pattern: Any


class _ExcludedModule:
    """False, and tells that the module was excluded rather than not targeted."""

    def __bool__(self) -> bool:
        return False


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """The rule for a ``target_modules`` that is one string: a full match."""
    return re.fullmatch(target_pattern, key)


def _named(names: Any, key: str) -> bool:
    """Whether ``key`` is in ``names``, ends with ``.name``, or fully matches the regex ``names``."""
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    return key in names or any(key.endswith(f".{name}") for name in names)


def _layer_index(key: str, patterns: Any) -> int | None:
    """The number of the layer that ``key`` lies in: the first below ``patterns``, or below anything."""
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", key)
        return int(match["idx"]) if match else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", key)
        if match:
            return int(match["idx"])
    return None


def check_target_module_exists(config: Any, key: str) -> bool | re.Match[str] | _ExcludedModule | None:
    """Whether ``config`` targets the module named ``key``.

    Returns:
        Something true when targeted; an ``_ExcludedModule`` (false) when ``exclude_modules`` or
        ``modules_to_save`` took it out; otherwise something false.
    """
    exclude = getattr(config, "exclude_modules", None)
    if exclude and _named(exclude, key):
        return _ExcludedModule()
    to_save = getattr(config, "modules_to_save", None)
    if to_save and any(re.match(rf"(^|.*\.){name}($|\..*)", key) for name in to_save):
        return _ExcludedModule()
    targets = config.target_modules
    if targets is None:
        return False
    if isinstance(targets, str):
        return match_target_against_key(targets, key)
    if key in targets:
        return True  # a full name is not subject to layers_to_transform
    if not any(key.endswith(f".{name}") for name in targets):
        return False
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or (isinstance(wanted, list) and not wanted):
        return True
    index = _layer_index(key, getattr(config, "layers_pattern", None))
    return index is not None and (index == wanted if isinstance(wanted, int) else index in wanted)


@functools.lru_cache(maxsize=1 << 16)
def anchored(key: str) -> re.Pattern[str]:
    """``key`` as the ending of a module name, at a dot boundary. `re` itself keeps 512 patterns, fewer than a
    model may have layers, and compiling takes a hundred times as long as matching.
    """
    return re.compile(rf"(.*\.)?({key})$")


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """The first of ``pattern_keys`` (regexes, anchored at a dot boundary) that matches, else the key."""
    for key in pattern_keys:
        if anchored(key).match(key_to_match):
            return key
    return key_to_match


def pattern_value(
    patterns: dict[str, Any] | None, name: str, default: Any, *, field_name: str = "pattern"
) -> Any:
    """The value that ``patterns`` gives to the module ``name``: the first match, as PEFT does.

    Warns when a later key matches too with another value, because the order of the dict then decides.
    """
    if not patterns:
        return default
    hits = [key for key in patterns if anchored(key).match(name)]
    if not hits:
        return default
    if any(patterns[hit] != patterns[hits[0]] for hit in hits[1:]):
        warnings.warn(
            f"{field_name}: {len(hits)} keys match module '{name}': {hits}; the first one is used.",
            RuntimeWarning,
            stacklevel=2,
        )
    return patterns[hits[0]]


def find_minimal_target_modules(targets: Iterable[str], others: Iterable[str]) -> set[str]:
    """The fewest, shortest suffixes that match all of ``targets`` and none of ``others``.

    Args:
        targets: Module names, none of them empty.
        others: Names that must not match; disjoint from ``targets``.

    Raises:
        ValueError: empty or string ``targets``, an empty name, or a name in both.
    """
    if isinstance(targets, str) or not targets:
        raise ValueError("target_modules should be a list or set of strings.")
    targets, others = set(targets), set(others)
    if "" in targets:
        raise ValueError("target_modules should not contain an empty string.")
    if not targets.isdisjoint(others):
        raise ValueError(
            "target_modules and other_module_names contain common elements, this should not happen, please "
            "open a GitHub issue at https://github.com/huggingface/peft/issues with the code to reproduce "
            "this issue"
        )

    def suffixes(name: str) -> list[str]:
        parts = name.split(".")
        return [".".join(parts[i:]) for i in reversed(range(len(parts)))]

    taken = {suffix for name in others for suffix in suffixes(name)}
    needed: set[str] = set()
    for name in sorted(targets, key=suffixes):
        for suffix in suffixes(name):
            if suffix in needed or suffix in taken:
                continue
            # A suffix chosen for an earlier name may already cover this one.
            if not any(name.endswith("." + chosen) for chosen in needed):
                needed.add(suffix)
                break
    return needed or targets


def condense(targets: Any, all_names: Sequence[str]) -> Any:
    """``targets`` as fewer suffixes where the list is long; unchanged for strings and short lists."""
    if not isinstance(targets, (list, set)) or len(targets) < MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        return targets
    endings = tuple("." + name for name in targets)
    others = [name for name in all_names if name not in targets and not name.endswith(endings)]
    fewer = find_minimal_target_modules(targets, others)
    return fewer if len(fewer) < len(targets) else targets


def is_all_linear(targets: Any) -> bool:
    """Whether ``targets`` is the shorthand for every linear layer (case does not matter)."""
    return isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def default_targets(model_type: str | None, *, need: bool = True) -> set[str] | str | None:
    """The default ``target_modules`` of a model type.

    Raises:
        ValueError: the type is unknown and ``need`` is set.
    """
    found = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type or "")
    if found is None:
        if need:
            raise ValueError("Please specify `target_modules` or `target_parameters`in `peft_config`")
        return None
    return found if isinstance(found, str) else set(found)


@dataclass
class TargetPlan:
    """What a config chose among named modules."""

    targeted: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    target_modules: Any = None


def plan_targets(
    config: Any,
    modules: Sequence[tuple[str, str]],
    *,
    model_type: str | None = None,
    output_layers: Collection[str] = (),
    kinds: Sequence[str] = ("linear", "conv1d", "embedding"),
) -> TargetPlan:
    """Choose among modules known only by name and kind, as read from a checkpoint on disk.

    Args:
        config: A LoraConfig (or anything with its targeting fields); not changed.
        modules: (dotted path, kind), kind being ``"linear"``, ``"conv1d"``, ``"embedding"`` or anything else.
        model_type: ``config.json``'s, for the default targets.
        output_layers: Paths of the output head's layers, which ``"all-linear"`` leaves out.
        kinds: Kinds that can be adapted at all; a targeted module of another kind is an error.

    Returns:
        The plan, in the order of ``modules``; ``target_modules`` is what an adapter_config.json should hold.

    Raises:
        NoMatchingPeftModuleError: nothing was targeted.
        ValueError: no targets given and none known for ``model_type``; a targeted module of another kind.
    """
    targets = config.target_modules
    if targets is None:
        targets = default_targets(model_type)
    if is_all_linear(targets):
        targets = {
            name
            for name, kind in modules
            if kind in LINEAR_KINDS and name not in output_layers and not reads_past_forward(model_type, name)
        }
    chosen = _Resolved(config, condense(targets, [name for name, _ in modules]))
    plan = TargetPlan(target_modules=chosen.target_modules)
    for name, kind in modules:
        result = check_target_module_exists(chosen, name)
        if isinstance(result, _ExcludedModule):
            plan.excluded.append(name)
        elif not result:
            plan.unmatched.append(name)
        elif kind not in kinds:
            raise ValueError(f"module '{name}' is a {kind}; only {', '.join(kinds)} can be adapted here")
        elif reason := why_not_adapted(model_type, name):
            raise ValueError(reason)
        elif reads_past_forward(model_type, name):
            raise ValueError(f"module '{name}' cannot be adapted: {model_type} reads its weight directly")
        else:
            plan.targeted.append(name)
    raise_if_nothing_matched(chosen, plan)
    return plan


def reads_past_forward(model_type: str | None, path: str) -> bool:
    """Whether such a model takes the weight of the module ``path`` itself, so that it must stay dense.

    Source: transformers 5.23, ``modeling_mamba.py`` and those like it.
    """
    return path.rpartition(".")[2] in _READ_PAST_FORWARD.get(model_type or "", ())


def why_not_adapted(model_type: str | None, path: str) -> str | None:
    """Why the module ``path`` of such a model can have no adapter (PEFT's words), or None where it can."""
    name = path.rpartition(".")[2]
    if model_type not in _MAMBA or name not in _NOT_IN_MAMBA:
        return None
    return (
        f"[PEFT:LORA] Module '{name}' is incompatible with Mamba-based models (model_type='{model_type}'). "
        f"Incompatible modules: {set(_NOT_IN_MAMBA)}. "
        "Please remove it from `target_modules` to avoid compatibility issues."
    )


class _Resolved:
    """A config with its target_modules replaced, the config itself left alone."""

    def __init__(self, config: Any, target_modules: Any) -> None:
        self._config = config
        self.target_modules = target_modules

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def raise_if_nothing_matched(config: Any, plan: TargetPlan) -> None:
    """PEFT's errors for a config that chose nothing, and its warning for an exclusion that excluded nothing.

    Raises:
        NoMatchingPeftModuleError: nothing was targeted.
    """
    if plan.targeted:
        if getattr(config, "exclude_modules", None) and not plan.excluded:
            warnings.warn(
                f"You have passed exclude_modules={config.exclude_modules} but no modules were excluded. "
                "Please check that exclude_modules was set correctly.",
                stacklevel=2,
            )
        return
    if plan.excluded and not plan.unmatched:
        raise NoMatchingPeftModuleError(
            "All modules were excluded. This is likely unintended. "
            "Check your `target_modules`, `exclude_modules` and `modules_to_save` configuration."
        )
    if not plan.excluded and not config.target_modules:
        raise NoMatchingPeftModuleError(
            "No `target_modules` passed but also no `target_parameters` found. Please check the values for "
            "these arguments."
        )
    if not plan.excluded:
        message = (
            f"Target modules {config.target_modules} not found in the base model. "
            "Please check the target modules and try again."
        )
    else:
        message = (
            "No modules were targeted for adaptation. "
            "This might be caused by a combination of mismatched target modules and excluded modules. "
            "Please check your `target_modules` and `exclude_modules` configuration. You may also have "
            "only targeted modules that are marked to be saved (`modules_to_save`)."
        )
    if getattr(config, "layers_to_transform", None) is not None:
        message += f" Note: You specified 'layers_to_transform': {config.layers_to_transform}."
    if getattr(config, "layers_pattern", None) is not None:
        message += f" You also specified 'layers_pattern': {config.layers_pattern}."
    raise NoMatchingPeftModuleError(message)


def warn_unmatched_patterns(config: Any, targeted: Sequence[str]) -> None:
    """Warn about keys of ``rank_pattern``, ``alpha_pattern`` and, for LoftQ, ``bits_pattern`` that match none
    of ``targeted``."""
    loftq = config.loftq_config if config.init_lora_weights == "loftq" else None
    for field_name, patterns in (
        ("rank_pattern", config.rank_pattern or {}),
        ("alpha_pattern", config.alpha_pattern or {}),
        ("bits_pattern", (loftq or {}).get("bits_pattern") or {}),
    ):
        unmatched = sorted(key for key in patterns if not any(anchored(key).match(name) for name in targeted))
        if unmatched:
            warnings.warn(
                f"The following {field_name} keys did not match any targeted module and were ignored: "
                f"{unmatched}.",
                RuntimeWarning,
                stacklevel=2,
            )
