"""What kind of module each tensor of a checkpoint belongs to, learned from config.json without any weights.

The model is built on the meta device by transformers. Its own renaming rules then tell which parameter each
tensor on disk becomes: base-model prefixes, renamed modules, and the conversions that fuse or split tensors
(mixture-of-experts weights since transformers 5).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import InputError, in_short

MAX_LAYERS = 10_000  # far above any model; a hostile config must not make us build modules for ever
# Heads of models without output embeddings; "all-linear" leaves them dense, as it does the output embeddings.
HEAD_NAMES = ("score", "classifier", "qa_outputs")


@dataclass(frozen=True)
class ModuleInfo:
    """One module of the model.

    Attributes:
        path: Dotted name.
        kind: "linear", "conv1d" (weight stored (in, out)), "embedding", or "other".
        shape: Of the weight: (out, in), for an embedding (rows, dim); empty for "other".
        stock_4bit: transformers' bitsandbytes integration replaces this module by a 4-bit one.
    """

    path: str
    kind: str
    shape: tuple[int, ...] = ()
    stock_4bit: bool = False


@dataclass(frozen=True)
class Home:
    """Which parameter a tensor on disk becomes; ``converted`` when only after fusing or splitting.

    Then ``converter`` is transformers' rule, and ``pattern`` the one of its sources that the name matched.
    """

    parameter: str
    converted: bool
    pattern: str | None = field(default=None, compare=False)
    converter: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Architecture:
    """A model's structure.

    Attributes:
        class_name: Name of the model class.
        model_type: config.json's.
        modules: Every module, the root excepted, in the model's order.
        parameters: Parameter and buffer names with their shapes; tied ones under each of their names.
        tied: Names of all parameters that share their memory with another.
        heads: Output heads, with what is inside them: the modules that "all-linear" leaves dense.
        base_prefix: Name of the base model inside the model class ("model", "bert"), empty if none.
        task: PEFT's task type where it adds nothing to the adapter, otherwise None.
    """

    class_name: str
    model_type: str
    modules: tuple[ModuleInfo, ...]
    parameters: dict[str, tuple[int, ...]]
    tied: frozenset[str]
    heads: tuple[str, ...]
    base_prefix: str
    task: str | None
    library: str
    _model: Any = field(repr=False, compare=False)

    def homes(self, keys: Iterable[str]) -> dict[str, Home]:
        """The parameter that each tensor name becomes; names that the model would ignore are left out."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        rules = get_model_conversion_mapping(self._model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix, state = self.base_prefix or None, self._model.state_dict()
        found = {}
        for key in keys:
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:  # named as in memory already
                name, pattern = key, None
            if name in state:
                rule = None if pattern is None else by_pattern[pattern]
                found[key] = Home(name, pattern is not None, pattern, rule)
        return found


def _first_line(error: BaseException) -> str:
    kind = type(error).__name__
    return f"{kind}: {in_short(error)}" if str(error).strip() else kind


def _check_size(config: Any) -> None:
    for name, value in config.items() if isinstance(config, dict) else ():
        if "layers" in str(name) and isinstance(value, int) and value > MAX_LAYERS:
            raise InputError(f"config.json: {name} is {value}; at most {MAX_LAYERS} layers are accepted")
        _check_size(value)


def _build(folder: Path, values: dict[str, Any], trust_remote_code: bool) -> Any:
    """The model of ``config.json`` on the meta device."""
    import transformers

    has_code = bool(values.get("auto_map"))
    known = values.get("model_type") in transformers.CONFIG_MAPPING
    if has_code and not known and not trust_remote_code:
        raise InputError(
            f"{folder}: model_type {values.get('model_type')!r} is defined by code that comes with "
            "the model; read that code, then pass --trust-remote-code to let it run"
        )
    if not known and not has_code:
        raise InputError(
            f"{folder} is not a model that transformers {transformers.__version__} knows: model_type is "
            f"{values.get('model_type')!r}"
        )
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    names = [name for name in values.get("architectures") or () if isinstance(name, str)]
    model_class = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            return model_class(config)
        auto = [name for name in values.get("auto_map") or () if name.startswith("AutoModel")]
        if names and not (auto and trust_remote_code):
            raise InputError(f"{folder}: transformers {transformers.__version__} has no class {names[0]}")
        chosen = "AutoModelForCausalLM" if "AutoModelForCausalLM" in auto else (auto or ["AutoModel"])[0]
        return getattr(transformers, chosen).from_config(config, trust_remote_code=trust_remote_code)


def _describe(path: str, module: nn.Module, keep_fp32: Iterable[str]) -> ModuleInfo:
    from transformers.pytorch_utils import Conv1D

    # transformers converts exact nn.Linears and Conv1Ds, but for those that it keeps in float32.
    stock = not any(path.endswith(name) or f".{name}." in f".{path}." for name in keep_fp32)
    if isinstance(module, nn.Linear):
        shape = (module.out_features, module.in_features)
        return ModuleInfo(path, "linear", shape, stock and type(module) is nn.Linear)
    if isinstance(module, Conv1D):
        return ModuleInfo(path, "conv1d", tuple(reversed(module.weight.shape)), stock)
    if isinstance(module, nn.Embedding):
        return ModuleInfo(path, "embedding", tuple(module.weight.shape))
    return ModuleInfo(path, "other")


def _task_type(class_name: str) -> str | None:
    """PEFT's task type, but for those whose PeftModel class would also train and save a head."""
    if class_name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if "Seq2Seq" in class_name or class_name in (
        "T5ForConditionalGeneration",
        "BartForConditionalGeneration",
    ):
        return "SEQ_2_SEQ_LM"
    return "FEATURE_EXTRACTION" if class_name.endswith("Model") else None


def read_architecture(
    folder: Path, config: dict[str, Any], *, trust_remote_code: bool = False
) -> Architecture:
    """Build the model that ``config`` (the contents of ``folder``'s config.json) describes, without weights.

    Args:
        folder: The checkpoint.
        config: Its config.json.
        trust_remote_code: Let the Python files of the folder run, where the model is defined by them.

    Raises:
        InputError: transformers does not know the model, or cannot build it from this config.
    """
    _check_size(config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _build(folder, config, trust_remote_code)
    except InputError:
        raise
    except Exception as error:  # whatever a model class raises on a config that does not suit it
        raise InputError(
            f"transformers cannot build a model from {folder}/config.json: {_first_line(error)}"
        ) from error
    head = model.get_output_embeddings()
    paths = dict(model.named_modules())
    heads = tuple(path for path, module in paths.items() if head is not None and module is head)
    heads = heads or tuple(path for path in paths if path.partition(".")[0] in HEAD_NAMES)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    keep_fp32 = tuple(model._keep_in_fp32_modules or ())
    return Architecture(
        class_name=type(model).__name__,
        model_type=str(config.get("model_type", "")),
        modules=tuple(_describe(path, module, keep_fp32) for path, module in paths.items() if path),
        parameters={name: tuple(value.shape) for name, value in model.state_dict().items()},
        tied=frozenset(tied) | frozenset(tied.values()),
        heads=heads,
        base_prefix=model.base_model_prefix or "",
        task=_task_type(type(model).__name__),
        library=type(model).__module__,
        _model=model,
    )
