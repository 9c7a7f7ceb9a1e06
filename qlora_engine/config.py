"""LoraConfig: PEFT's fields, defaults, checks and ``adapter_config.json``, both ways."""

from __future__ import annotations

import copy
import dataclasses
import enum
import importlib.metadata
import inspect
import json
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import packaging.version
from huggingface_hub import hf_hub_download
from torch import nn
from transformers.utils import PushToHubMixin, http_user_agent

from .files import read_json_object, write_text
from .init_configs import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, LoraRuntimeConfig, as_subconfig
from .patterns import why_slow

__all__ = [
    "CONFIG_NAME",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "UNSUPPORTED_FIELDS",
    "CordaConfig",
    "EvaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
    "PeftConfig",
    "PeftConfigMixin",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "get_peft_config",
]

# The PEFT release whose file format we write; it goes into `peft_version`.
__version__ = "0.21.2"
CONFIG_NAME = "adapter_config.json"
# A JSON file without these is no adapter config.
MIN_EXPECTED_CONFIG_KEYS = {"peft_type"}
# PEFT fields that this engine does not implement, with the only value it accepts.
UNSUPPORTED_FIELDS: dict[str, Any] = {
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "velora_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "arrow_config": None,
    "alora_invocation_tokens": None,
    "layer_replication": None,
}


class PeftWarning(UserWarning):
    """Something in an adapter that works but probably not as meant."""


class PeftType(str, enum.Enum):
    """The adapter method of a config; this engine has one."""

    LORA = "LORA"


class TaskType(str, enum.Enum):
    """What the base model is for; chooses the PeftModelFor... class."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def _get_commit_hash(package: str) -> str | None:
    """The commit that ``package`` was installed from, where pip recorded one."""
    try:
        text = importlib.metadata.distribution(package).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    return json.loads(text).get("vcs_info", {}).get("commit_id") if text else None


def _version_string() -> str:
    if packaging.version.Version(__version__).dev is None:
        return __version__
    commit = None
    try:
        commit = _get_commit_hash("peft")
    except Exception:  # a version string must never stop a training script
        warnings.warn(
            "A dev version of PEFT is used but there was an error while trying to determine the commit hash.",
            stacklevel=2,
        )
    return f"{__version__}@{commit or 'UNKNOWN'}"


def _refuse_slow_patterns(values: dict[str, Any]) -> None:
    """Patterns of a file run on every module name: none may take for ever."""
    for name in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        given = values.get(name)
        patterns = [given] if isinstance(given, str) else given if isinstance(given, (dict, list)) else ()
        for pattern in map(str, patterns):
            try:
                reason = why_slow(pattern)
            except re.error as error:
                reason = f"no regular expression: {error}"
            if reason:
                raise ValueError(f"{name}: {pattern!r:.60} could take for ever: {reason}")


@dataclass
class PeftConfigMixin(PushToHubMixin):
    """What every adapter config has: its type, its version, and its JSON file."""

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise ValueError(
                f"Invalid task type: '{self.task_type}'. Must be one of the following task types: "
                f"{', '.join(TaskType)}."
            )
        if self.peft_version is None:
            self.peft_version = _version_string()

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain containers (sets stay sets)."""
        return dataclasses.asdict(self)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``adapter_config.json`` into ``save_directory``, atomically, keys sorted.

        Args:
            save_directory: Folder; made when missing.
            kwargs: ``auto_mapping_dict`` replaces ``auto_mapping`` in the file.

        Raises:
            AssertionError: ``save_directory`` is a file (PEFT's type of error).
        """
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        os.makedirs(save_directory, exist_ok=True)
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        # Sorted: PEFT's order of target_modules changes from run to run.
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in self.to_dict().items()}
        if auto_mapping is not None:
            values["auto_mapping"] = auto_mapping
        write_text(Path(save_directory) / CONFIG_NAME, json.dumps(values, indent=2, sort_keys=True))

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """A config of the class that ``kwargs["peft_type"]`` names (or ``cls``); unknown keys are dropped.

        Raises:
            TypeError: no ``peft_type`` and unknown keys: this is no adapter config.
            KeyError: ``peft_type`` names a method that this engine does not have.
        """
        config_cls = cls
        if "peft_type" in kwargs:
            if kwargs["peft_type"] not in list(PEFT_TYPE_TO_CONFIG_MAPPING):  # what a file has need not hash
                known = ", ".join(t.value for t in PEFT_TYPE_TO_CONFIG_MAPPING)
                raise KeyError(f"peft_type={kwargs['peft_type']!r} is not supported; supported: {known}")
            config_cls = PEFT_TYPE_TO_CONFIG_MAPPING[kwargs["peft_type"]]
        accepted = set(inspect.signature(config_cls.__init__).parameters)
        unexpected = sorted(set(kwargs) - accepted)
        if unexpected:
            kwargs = {k: v for k, v in kwargs.items() if k in accepted}
            if not MIN_EXPECTED_CONFIG_KEYS.issubset(kwargs):
                raise TypeError(
                    f"The {cls.__name__} config that is trying to be loaded is missing required keys: "
                    f"{MIN_EXPECTED_CONFIG_KEYS}."
                )
            warnings.warn(
                f"Unexpected keyword arguments {unexpected} for class {config_cls.__name__}, these are "
                "ignored. The file was probably written by a later version.",
                stacklevel=2,
            )
        return config_cls(**kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read ``adapter_config.json`` from a folder or a hub repository.

        Args:
            pretrained_model_name_or_path: Folder, or repository id.
            subfolder: Folder below it.
            kwargs: hf_hub_download's arguments (``revision``, ``token``, ``cache_dir`` ...).

        Raises:
            ValueError: there is no such file, it holds no JSON object, or a field has a value that this
                engine does not implement.
        """
        name = os.fspath(pretrained_model_name_or_path)
        hub_kwargs, class_kwargs, _ = cls._split_kwargs(kwargs)
        values = cls.from_json_file(cls._find_file(name, subfolder, hub_kwargs))
        _refuse_slow_patterns(values)
        return cls.from_peft_type(**cls.check_kwargs(**{**class_kwargs, **values}))

    @staticmethod
    def _find_file(name: str, subfolder: str | None, hub_kwargs: dict[str, Any]) -> str:
        local = os.path.join(name, subfolder or "", CONFIG_NAME)
        if os.path.isfile(local):
            return local
        hub_kwargs.setdefault("user_agent", http_user_agent())
        try:
            return hf_hub_download(name, CONFIG_NAME, subfolder=subfolder, **hub_kwargs)
        except Exception as error:
            raise ValueError(f"Can't find '{CONFIG_NAME}' at '{name}'") from error

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The file's values as a dict, without a ``runtime_config`` (it is never valid on disk).

        Raises:
            InputError: a ValueError; the file holds no JSON object.
        """
        values = read_json_object(Path(path_json_file))
        if "runtime_config" in values:
            warnings.warn(
                "The configuration file contains a `runtime_config` key. This is ignored. Runtime "
                "configurations are only valid at runtime.",
                stacklevel=2,
            )
            del values["runtime_config"]
        return values

    @classmethod
    def _split_kwargs(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """``kwargs`` as (arguments of hf_hub_download, fields of this class, the rest)."""
        hub: dict[str, Any] = {}
        own: dict[str, Any] = {}
        other: dict[str, Any] = {}
        hub_names = set(inspect.signature(hf_hub_download).parameters)
        own_names = set(cls.__annotations__)
        for key, value in kwargs.items():
            (hub if key in hub_names else own if key in own_names else other)[key] = value
        return hub, own, other

    @classmethod
    def _get_peft_type(cls, model_id: str, **hub_kwargs: Any) -> str:
        subfolder = hub_kwargs.pop("subfolder", None)
        path = cls._find_file(os.fspath(model_id), subfolder, hub_kwargs)
        values = cls.from_json_file(path)
        if "peft_type" not in values:
            raise ValueError(f"{path} is no adapter's config: it has no peft_type")
        return values["peft_type"]

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """A place for subclasses to look at a file's values first."""
        return kwargs

    @property
    def is_prompt_learning(self) -> bool:
        """Always False: this engine has no prompt methods."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Always False: this engine has no prompt methods."""
        return False


@dataclass
class PeftConfig(PeftConfigMixin):
    """The base model an adapter belongs to, and whether it is only for inference."""

    base_model_name_or_path: str | None = None
    revision: str | None = None
    peft_type: str | PeftType | None = None
    task_type: str | TaskType | None = None
    inference_mode: bool = False


@dataclass
class LoraConfig(PeftConfig):
    """PEFT's LoraConfig: same fields, defaults, checks and JSON.

    Args:
        r: Rank, positive.
        target_modules: Names (exact or ``.suffix``), one regex (full match), ``"all-linear"``, or
            None for the defaults of the model type.
        exclude_modules: Same matching; wins over ``target_modules``.
        lora_alpha: Scaling is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.
        lora_dropout: Of the LoRA branch's input only.
        fan_in_fan_out: The weight is stored (in, out), as GPT-2's Conv1D does; corrected with a warning.
        bias: ``"none"``, ``"all"`` or ``"lora_only"``: which biases train.
        modules_to_save: Modules that train in full and are saved.
        init_lora_weights: True, False, "gaussian", "loftq", "pissa", "pissa_niter_N", "olora", "orthogonal",
            "eva".
        layers_to_transform, layers_pattern: Only these layer indices of the suffix matches.
        rank_pattern, alpha_pattern: Module-name regex -> value; first match wins.
        trainable_token_indices: Rows of the input embedding (list) or of named embeddings (dict) that train.
        loftq_config: LoftQConfig or dict; required by (and only by) ``init_lora_weights="loftq"``.
        use_dora: Weight-decomposed LoRA (Liu et al., arXiv:2402.09353).
        lora_bias: A bias on lora_B.
        target_parameters: Names of nn.Parameters (mixture-of-experts weights) to adapt.
        ensure_weight_tying: Tie the adapters of tied layers.

    Fields that are not implemented are accepted at PEFT's default only (``UNSUPPORTED_FIELDS``).

    Raises:
        ValueError, TypeError: PEFT's own for bad values, and for a field that this engine does not implement.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.ensure_weight_tying:
            self.modules_to_tie: list[str] | None = None
            self.target_modules_to_tie: list[str] | None = None
        self.eva_config = as_subconfig(self.eva_config, EvaConfig)
        self.corda_config = as_subconfig(self.corda_config, CordaConfig)
        self.lora_ga_config = as_subconfig(self.lora_ga_config, LoraGAConfig)
        self._check_targets()
        self._check_supported()
        self._check_initialisation()
        self._custom_modules: dict[type[nn.Module], type[nn.Module]] | None = None

    def _check_targets(self) -> None:
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        if isinstance(self.target_modules, str):
            if self.layers_to_transform is not None:
                raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
            if self.layers_pattern is not None:
                raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified. "
            )

    def _check_supported(self) -> None:
        if self.use_dora and self.megatron_config:
            raise ValueError("DoRA does not support megatron_core, please set `use_dora=False`.")
        refused = [name for name, default in UNSUPPORTED_FIELDS.items() if getattr(self, name) != default]
        if refused:
            wanted = ", ".join(f"{name}={getattr(self, name)!r}" for name in refused)
            raise ValueError(f"not implemented here, leave at the default: {wanted}")

    def _check_initialisation(self) -> None:
        init = self.init_lora_weights
        if init == "loftq":
            if not self.loftq_config:
                raise ValueError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
            if not isinstance(self.loftq_config, dict):
                self.loftq_config = dict(vars(self.loftq_config))
            LoftQConfig.from_dict(self.loftq_config)
        elif self.loftq_config:
            self.loftq_config = {}
            warnings.warn(
                "`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'.",
                stacklevel=2,
            )
        elif self.loftq_config is None:  # old files hold null
            self.loftq_config = {}
        for kind, name, cls in (("eva", "EVA", EvaConfig), ("corda", "CorDA", CordaConfig)):
            given = getattr(self, f"{kind}_config")
            if init == kind and given is None:
                warnings.warn(
                    f"`init_lora_weights` is '{kind}' but `{kind}_config` is not specified. "
                    f"Using default {name} config.",
                    stacklevel=2,
                )
                setattr(self, f"{kind}_config", cls())
            elif init != kind and given is not None:
                warnings.warn(
                    f"`{kind}_config` specified but will be ignored when `init_lora_weights` is "
                    f"not '{kind}'.",
                    stacklevel=2,
                )
        if self.lora_bias:
            if init not in (True, False):
                raise ValueError(
                    "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
                    f"init_lora_weights={init} instead."
                )
            if self.use_dora:
                raise ValueError(
                    "The argument lora_bias=True is not supported for DoRA, please pass use_dora=False"
                )
        changes_base = isinstance(init, str) and (
            init.startswith("pissa") or init in ("olora", "corda", "lora_ga")
        )
        if self.use_rslora and (self.rank_pattern or self.alpha_pattern) and changes_base:
            warnings.warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion of "
                "modified base weights PiSSA/CorDA/OLoRA/LoRA-GA means that you won't be able to pass "
                "`path_initial_model_for_weight_conversion` to `save_pretrained` to restore the initial "
                "values of the base weights; if you intend to do this, please ensure not to use rslora or "
                "rank_pattern/alpha_pattern.",
                stacklevel=2,
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain containers, without ``runtime_config`` and the texts that LoftQ looked at."""
        lean = copy.copy(self)
        if isinstance(lean.loftq_config, dict):  # a DataLoader or a generator can't be copied
            live = ("calibration", "tokenizer")
            lean.loftq_config = {key: value for key, value in lean.loftq_config.items() if key not in live}
        values = dataclasses.asdict(lean)
        values.pop("runtime_config")
        return values

    def _register_custom_module(self, mapping: dict[type[nn.Module], type[nn.Module]]) -> None:
        """Adapt layers of the types in ``mapping`` with the given LoRA classes (not saved)."""
        self._custom_modules = {**(self._custom_modules or {}), **mapping}


PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = {PeftType.LORA: LoraConfig}
PEFT_TYPE_TO_PREFIX_MAPPING: dict[PeftType, str] = {PeftType.LORA: "lora_"}


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The config that ``config_dict`` (with its ``peft_type``) describes."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[config_dict["peft_type"]](**config_dict)
