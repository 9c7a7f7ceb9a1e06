"""Which modules of a model in memory a config means, before any of them is touched."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from torch import nn

from quant.experts import QuantExperts
from quant.linear import QuantLinear

from .base_weight import is_bnb_linear, is_conv1d
from .config import LoraConfig
from .expert_targets import carry_over_experts
from .lora import Linear
from .targets import (
    SEQ_CLS_HEAD_NAMES,
    TargetPlan,
    _ExcludedModule,
    default_targets,
    is_all_linear,
    raise_if_nothing_matched,
)
from .tuner_layer import BaseTunerLayer
from .tying import is_tied_target

DUMMY_MODEL_CONFIG = {"model_type": "custom"}


def model_config_dict(model: nn.Module) -> dict[str, Any]:
    """``model.config`` as a dict; a dummy for models that have none."""
    config: Any = getattr(model, "config", DUMMY_MODEL_CONFIG)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    return cast(dict[str, Any], config)


def all_linear_names(model: Any, task_type: str | None) -> set[str]:
    """Full names of the linear layers of ``model``, without its output layer and without layers inside
    adapters."""
    names: set[str] = set()
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(name + ".")
            if isinstance(module, Linear):
                names.add(name)
        elif isinstance(module, QuantExperts):
            inside.append(name + ".")
        elif isinstance(module, (nn.Linear, QuantLinear)) or is_conv1d(module) or is_bnb_linear(module):
            names.add(name)
    get_output = getattr(model, "get_output_embeddings", None)
    if get_output is not None and hasattr(model, "config"):
        head = get_output()
        if head is None and task_type == "SEQ_CLS":
            head = next((getattr(model, n) for n in SEQ_CLS_HEAD_NAMES if hasattr(model, n)), None)
        names -= {name for name, module in model.named_modules() if head is not None and module is head}
    return names


def choose_targets(config: LoraConfig, model: nn.Module) -> None:
    """Complete ``target_modules`` and ``target_parameters`` in place: the defaults of the model's type, and
    experts that are stacked now."""
    if config.target_modules is None:
        model_type = model_config_dict(model).get("model_type")
        config.target_modules = default_targets(model_type, need=not config.target_parameters)
    carry_over_experts(config, model)


def expand_all_linear(config: LoraConfig, model: nn.Module) -> None:
    """Replace "all-linear" by the names it stands for, in place."""
    if is_all_linear(config.target_modules):
        config.target_modules = all_linear_names(model, config.task_type)


def plan_modules(
    config: LoraConfig,
    candidates: Sequence[str],
    keys: Iterable[str] | None,
    prefix: str,
    *,
    matches: Callable[[LoraConfig, str], Any],
) -> tuple[TargetPlan, list[str]]:
    """Which of the modules named ``candidates`` are adapted, and which of them follow a tied one.

    Args:
        config: Of the adapter.
        candidates: Module names.
        keys: Of a state dict that chooses the modules instead of the config, which is then compared.
        prefix: What adapters' keys begin with after the module's name.
        matches: (config, name) -> whether the config means the module.
    """
    plan, tied = TargetPlan(target_modules=config.target_modules), []
    wanted = None
    if keys is not None:
        # "_orig_mod." is what torch.compile puts before the names.
        wanted = {key.rsplit("." + prefix, 1)[0].removeprefix("_orig_mod.") for key in keys}
    by_config = []
    for key in candidates:
        result = matches(config, key)
        if result:
            by_config.append(key)
        plain = key.removeprefix("_orig_mod.")
        if is_tied_target(config, key) and (wanted is None or plain in wanted):
            tied.append(key)
        elif wanted is None and isinstance(result, _ExcludedModule):
            plan.excluded.append(key)
        elif plain in wanted if wanted is not None else result:
            plan.targeted.append(key)
        else:
            plan.unmatched.append(key)
    if wanted is not None:
        _warn_about_difference(set(by_config), {*plan.targeted, *tied})
    return plan, tied


def check_plan(config: LoraConfig, plan: TargetPlan, parameters: list[str], dummy: bool) -> None:
    """Raise or warn where the config chose nothing, of modules or of Parameters.

    Raises:
        NoMatchingPeftModuleError: no module, and no Parameter.
    """
    if dummy or (parameters and not plan.targeted):
        if config.target_modules and not dummy:
            warnings.warn(
                f"target_modules={config.target_modules} were set but no module was matched.",
                RuntimeWarning,
                stacklevel=4,
            )
        return
    raise_if_nothing_matched(config, plan)
    if config.target_parameters and not parameters:
        warnings.warn(
            f"target_parameters={config.target_parameters} were set but no parameter was matched.",
            RuntimeWarning,
            stacklevel=4,
        )


def _warn_about_difference(by_config: set[str], by_keys: set[str]) -> None:
    if by_config == by_keys:
        return
    message = (
        "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and "
        "the provided state_dict. This is not necessarily an issue and can be ignored if this was the "
        "intent. "
    )
    if by_config - by_keys:
        message += (
            f"The PEFT config contained these additional target modules: {sorted(by_config - by_keys)}. "
        )
    if by_keys - by_config:
        message += (
            f"The state_dict contained these additional target modules: {sorted(by_keys - by_config)}. "
        )
    warnings.warn(message, RuntimeWarning, stacklevel=5)
