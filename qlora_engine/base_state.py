"""The state dict of the base model in an adapted one, with the keys that it had before."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .auxiliary import AuxiliaryTrainingWrapper
from .tuner_layer import BaseTunerLayer

IncompatibleKeys = namedtuple("IncompatibleKeys", ["missing_keys", "unexpected_keys"])


def _base_keys(model: Any) -> dict[str, str]:
    """Key that the base model had -> key in the state dict of the adapted one."""
    base = model.base_model.model
    found: dict[str, str] = {}
    for key in base.state_dict():
        original, current, is_adapter = [], base, False
        for part in key.split("."):
            child = getattr(current, part, None) if isinstance(current, nn.Module) else None
            in_layer, in_wrapper = (
                isinstance(current, kind) for kind in (BaseTunerLayer, AuxiliaryTrainingWrapper)
            )
            is_adapter |= (in_layer and part != "base_layer") or (in_wrapper and part == "modules_to_save")
            hidden = (in_layer and part == "base_layer") or (
                in_wrapper and part in ("original_module", "token_adapter")
            )
            if not hidden:
                original.append(part)
            current = child
        if not is_adapter:
            found[".".join(original)] = key
    return found


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The base model's state dict with the keys it had before it was adapted."""
    state_dict = model.base_model.model.state_dict()
    return {original: state_dict[key] for original, key in _base_keys(model).items()}


def set_base_model_state_dict(model: Any, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Load a state dict with the base model's own keys into the adapted model.

    Returns:
        A named tuple of ``missing_keys`` and ``unexpected_keys``.

    Raises:
        RuntimeError: ``strict`` and the keys differ.
    """
    keys = _base_keys(model)
    missing = [key for key in keys if key not in state_dict]
    unexpected = [key for key in state_dict if key not in keys]
    if strict and (missing or unexpected):
        problems = [f"Missing key(s) in state_dict: {missing}"] if missing else []
        problems += [f"Unexpected key(s) in state_dict: {unexpected}"] if unexpected else []
        raise RuntimeError("Error(s) in loading state_dict:\n\t" + "\n\t".join(problems))
    loadable = {keys[key]: value for key, value in state_dict.items() if key in keys}
    model.base_model.model.load_state_dict(loadable, strict=False)
    return IncompatibleKeys(missing, unexpected)
