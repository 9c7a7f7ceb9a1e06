"""The weights of one adapter as a state dict with PEFT's file keys, out of a model and into it.

In memory a key names its adapter (``q.lora_A.default.weight``), on disk it does not (``q.lora_A.weight``);
DoRA's magnitude loses ``.weight`` as well.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import tuner_layers
from .auxiliary import AuxiliaryTrainingWrapper
from .config import PeftWarning
from .expert_weights import convert_for_architecture
from .targets import EMBEDDING_LAYER_NAMES, INCLUDE_LINEAR_LAYERS_SHORTHAND, match_target_against_key
from .tuner_layer import BaseTunerLayer

PREFIX = "base_model.model."
_FSDP = "_fsdp_wrapped_module."
_MAGNITUDE = ".lora_magnitude_vector"


def _named_wrappers(model: nn.Module) -> Iterator[tuple[str, AuxiliaryTrainingWrapper]]:
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield name.removeprefix(_FSDP), module


def adapter_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Key on disk -> key in ``model.state_dict()`` of every weight of an adapter's LoRA layers."""
    wrapped = tuple(f"{name}." for name, _ in _named_wrappers(model))
    keys: dict[str, str] = {}
    for name, module in model.named_modules():
        name = name.removeprefix(_FSDP)
        # Layers inside a wrapper are saved by the wrapper; MultiheadAttention's out_proj lies in a base
        # layer.
        if isinstance(module, BaseTunerLayer) and not f"{name}.".startswith(wrapped):
            keys.update(_layer_keys(name, module, adapter_name))
    return keys


def _layer_keys(name: str, layer: BaseTunerLayer, adapter_name: str) -> Iterator[tuple[str, str]]:
    """Key on disk and in memory of an adapter's weights in one layer."""
    prefix = f"{name}." if name else ""
    for attribute in layer.adapter_layer_names:
        container = getattr(layer, attribute)
        if adapter_name not in container:
            continue
        item = container[adapter_name]
        if not isinstance(item, nn.Module):
            yield f"{prefix}{attribute}", f"{prefix}{attribute}.{adapter_name}"
            continue
        for key in item.state_dict():
            on_disk = f"{prefix}{attribute}.{key}"
            if attribute == "lora_magnitude_vector":
                on_disk = on_disk.removesuffix(".weight")
            yield on_disk, f"{prefix}{attribute}.{adapter_name}.{key}"


def keys_in_memory(model: nn.Module, adapter_name: str) -> set[str]:
    """All that an adapter has in ``model.state_dict()``, modules that train in full and tied rows included.

    Found by where the weights are: an adapter's name may be a part of any path, as "0" of "layers.0.q_proj".
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            found.update(key for _, key in _layer_keys(name.removeprefix(_FSDP), module, adapter_name))
    for name, wrapper in _named_wrappers(model):
        own = wrapper.adapter_state_dict_load_map(adapter_name)  # type: ignore[attr-defined]
        found.update(f"{name}.{key}" for key in own.values())
    return found


def _bias_keys(model: nn.Module, state_dict: Mapping[str, Tensor], bias: str) -> list[str]:
    if bias == "all":
        return [key for key in state_dict if key == "bias" or key.endswith(".bias")]
    if not bias.endswith("_only"):
        return []
    names = [name.removeprefix(_FSDP) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    keys = [f"{name}.base_layer.bias" if name else "base_layer.bias" for name in names]
    return [key for key in keys if key in state_dict]


def _strip_name(key: str, adapter_name: str) -> str:
    """The key without the adapter's name, where that is its last part or the last but one."""
    if key.endswith(f".{adapter_name}"):
        return key.removesuffix(f".{adapter_name}")
    head, _, tail = key.rpartition(".")
    return f"{head.removesuffix(f'.{adapter_name}')}.{tail}" if head else key


def get_peft_model_state_dict(
    model: Any,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """What a file holds of one adapter: its factors, biases, trained modules and tokens; the tensors are
    shared.

    Args:
        model: A PeftModel, or any model with adapters injected.
        state_dict: Of ``model``, if it has to be gathered by the caller; default: ``model.state_dict()``.
        adapter_name: Which adapter.
        unwrap_compiled: ``model`` is what torch.compile returned.
        save_embedding_layers: True, False, or "auto": where the embedding is adapted or was resized.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    config = model.peft_config[adapter_name]
    given = state_dict is not None
    if state_dict is None:
        state_dict = model.state_dict()
    mine = keys_in_memory(model, adapter_name)
    theirs = {
        key for name in model.peft_config if name != adapter_name for key in keys_in_memory(model, name)
    }
    state_dict = {key: value for key, value in state_dict.items() if key not in theirs}
    keys = {disk: key for disk, key in adapter_keys(model, adapter_name).items() if key in state_dict}
    keys.update({k: k for k in _bias_keys(model, state_dict, config.bias) if k not in mine})
    for name, wrapper in _named_wrappers(model):
        for disk, own in wrapper.adapter_state_dict_load_map(adapter_name).items():  # type: ignore[attr-defined]
            keys[f"{name}.{disk}"] = f"{name}.{own}"
    for key in _embedding_keys(model, config, state_dict, save_embedding_layers):
        keys.setdefault(_strip_name(key, adapter_name) if key in mine else key, key)
    found = {disk: state_dict[key] for disk, key in keys.items()}
    if not given:
        _warn_about_shards(found, adapter_name)
    return found


def _warn_about_shards(state_dict: dict[str, Tensor], adapter_name: str) -> None:
    bad = [
        (key, tuple(tensor.shape))
        for key, tensor in state_dict.items()
        if (".lora_A" in key or ".lora_B" in key) and (tensor.dim() < 2 or not tensor.numel())
        if key.endswith(".weight")
    ]
    if bad:
        preview = ", ".join(f"{key}:{shape}" for key, shape in bad[:3])
        preview += f" (+{len(bad) - 3} more)" if len(bad) > 3 else ""
        warnings.warn(
            f"Adapter {adapter_name!r}: {len(bad)} LoRA tensor(s) have invalid shape: {preview}. A 1-D or "
            "zero-sized lora_A / lora_B tensor indicates that DeepSpeed ZeRO-3 / FSDP shards were not "
            "gathered before save_pretrained().",
            PeftWarning,
            stacklevel=3,
        )


def _embedding_is_targeted(model: Any, config: Any) -> bool:
    targets = config.target_modules
    if isinstance(targets, str):
        if targets == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            return False
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        pattern = rf"(.*\.)?({'|'.join(EMBEDDING_LAYER_NAMES)})$"
        return any(
            match_target_against_key(targets, name)
            for name, _ in base.named_modules()
            if re.match(pattern, name)
        )
    return any(name in targets for name in EMBEDDING_LAYER_NAMES) if targets else False


def _embedding_keys(
    model: Any, config: Any, state_dict: dict[str, Tensor], save_embedding_layers: bool | str
) -> list[str]:
    """Keys of the embedding and head, where they are to be saved in full."""
    targeted = _embedding_is_targeted(model, config)
    if save_embedding_layers == "auto":
        if targeted and config.trainable_token_indices is None:
            warnings.warn(
                "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.",
                stacklevel=3,
            )
            save_embedding_layers = True
        else:
            save_embedding_layers = _vocabulary_was_resized(model, config)
    if not save_embedding_layers:
        return []
    if not hasattr(model, "get_input_embeddings"):
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers model.",
            stacklevel=3,
        )
        return []
    keys: list[str] = []
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        base = getattr(layer, "base_layer", None)
        if layer is None or (targeted and not isinstance(base, (nn.Linear, nn.Embedding))):
            continue
        wanted = base if targeted else layer
        name = next((name for name, module in model.named_modules() if module is wanted), None)
        if name:
            keys += [key for key in state_dict if key.startswith(f"{name}.")]
    return keys


def _vocabulary_was_resized(model: Any, config: Any) -> bool:
    """Whether the model's vocabulary differs from that of the checkpoint it came from."""
    now = getattr(getattr(model, "config", None), "vocab_size", None)
    source = getattr(config, "base_model_name_or_path", None)
    if not now or not source:
        return False
    if not os.path.exists(os.path.join(source, "config.json")):
        exists = _on_hub(source, "config.json")
        if exists is None:
            warnings.warn(
                f"Could not find a config file in {source} - will assume that the vocabulary was not "
                "modified.",
                stacklevel=4,
            )
        if not exists:
            return False
    if now == type(model.config).from_pretrained(source).vocab_size:
        return False
    warnings.warn(
        "Setting `save_embedding_layers` to `True` as the embedding layer has been resized during "
        "finetuning.",
        stacklevel=4,
    )
    return True


def _on_hub(repository: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether the hub has a file; None if it cannot be asked."""
    from huggingface_hub import constants, file_exists

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return bool(file_exists(repository, filename, **kwargs))
    except Exception as error:  # any network, address or permission error means the same here
        warnings.warn(
            f"Unable to fetch remote file due to the following error {error} - silently ignoring the lookup "
            f"for the file {filename} in {repository}.",
            stacklevel=4,
        )
        return None


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    keep_dtype: bool = False,
) -> Any:
    """Load an adapter's file into a model that has the adapter's layers already.

    Args:
        model: A PeftModel, or any model with adapters injected.
        peft_model_state_dict: Keys as in a file, with or without ``base_model.model.``.
        adapter_name: The adapter to fill; the file does not name one.
        ignore_mismatched_sizes: Leave tensors of another shape out, with a warning.
        low_cpu_mem_usage: The adapter's weights are on the meta device: take the tensors themselves.
        keep_dtype: With ``low_cpu_mem_usage``, keep the file's dtype instead of casting to the base layer's.

    Returns:
        A named tuple of ``missing_keys`` (of the whole model) and ``unexpected_keys``.

    Raises:
        RuntimeError: a tensor of another shape.
        KeyError: a trained module of the adapter is not in the file.
    """
    state_dict = _convert_for_architecture(model, peft_model_state_dict, adapter_name)
    for name, wrapper in _named_wrappers(model):
        for disk, own in wrapper.adapter_state_dict_load_map(adapter_name).items():  # type: ignore[attr-defined]
            state_dict[f"{name}.{own}"] = state_dict.pop(f"{name}.{disk}")
    keys = adapter_keys(model, adapter_name)
    keys.update({f"{disk}.weight": key for disk, key in keys.items() if disk.endswith(_MAGNITUDE)})
    keys.update({f"{PREFIX}{disk}": key for disk, key in keys.items() if not disk.startswith(PREFIX)})
    state_dict = {keys.get(key, key): value for key, value in state_dict.items()}
    if not any(name.startswith(PREFIX) for name, _ in model.named_parameters()):
        state_dict = {key.removeprefix(PREFIX): value for key, value in state_dict.items()}
    if ignore_mismatched_sizes:
        state_dict = _without_mismatches(model, state_dict)
    result = model.load_state_dict(state_dict, strict=False, assign=low_cpu_mem_usage)
    if low_cpu_mem_usage:
        for layer in tuner_layers(model):
            layer._move_adapter_to_device_of_base_layer(adapter_name, keep_dtype=keep_dtype)
    return result


def _without_mismatches(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    own = model.state_dict()
    bad = {
        key: (tuple(tensor.shape), tuple(own[key].shape))
        for key, tensor in state_dict.items()
        if key in own and own[key].shape != tensor.shape
    }
    if bad:
        listed = "\n".join(
            f"- {key}: found shape {found} in the checkpoint and {wanted} in the model instantiated"
            for key, (found, wanted) in bad.items()
        )
        warnings.warn(
            f"Some weights of {type(model).__name__} were not initialized from the model checkpoint "
            f"and are being ignored because you passed `ignore_mismatched_sizes=True`: {listed}.",
            stacklevel=3,
        )
    return {key: tensor for key, tensor in state_dict.items() if key not in bad}


def _convert_for_architecture(
    model: Any, state_dict: Mapping[str, Tensor], adapter_name: str
) -> dict[str, Tensor]:
    """The keys of an adapter that was written for the layout of an earlier transformers, as they are now."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    expected = {PREFIX + key.removeprefix(PREFIX) for key in adapter_keys(model, adapter_name)}
    return convert_for_architecture(base, state_dict, expected, PREFIX)


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: dict[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """The tensors of an adapter folder or hub repository; safetensors only.

    Args:
        model_id: Folder or repository id.
        device: Where to put them; default: the CPU.
        key_mapping: Regex -> replacement, applied to the keys without ``base_model.model.``; first match
            only.
        hf_hub_download_kwargs: ``subfolder``, ``revision``, ``token``, ``cache_dir`` ...

    Raises:
        ValueError: no such file; or only a pickle, which is not loaded.
    """
    from safetensors.torch import load_file

    tensors = load_file(
        _weights_file(os.fspath(model_id), hf_hub_download_kwargs), device=str(device or "cpu")
    )
    if not key_mapping:
        return tensors
    mapped: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        prefix = next((p for p in (PREFIX, "base_model.") if key.startswith(p)), None)
        if prefix is None:
            raise ValueError(f"key_mapping: key '{key}' does not begin with 'base_model.'")
        key = key.removeprefix(prefix)
        for pattern, replacement in key_mapping.items():
            new, count = re.subn(pattern, replacement, key)
            if count:
                key = new
                break
        mapped[prefix + key] = tensor
    return mapped


def _weights_file(model_id: str, hub_kwargs: dict[str, Any]) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    name, pickle = "adapter_model.safetensors", "adapter_model.bin"
    folder = os.path.join(model_id, hub_kwargs.get("subfolder") or "")
    if os.path.exists(os.path.join(folder, name)):
        return os.path.join(folder, name)
    advice = f"only safetensors adapters are loaded; convert {pickle} with PEFT's save_pretrained"
    if os.path.exists(os.path.join(folder, pickle)):
        raise ValueError(f"{folder} holds {pickle}, a pickle that could run code; {advice}")
    if os.path.isdir(folder):
        raise ValueError(f"Can't find weights for {model_id}: no {name} in {folder}")
    try:
        return hf_hub_download(model_id, name, **hub_kwargs)
    except EntryNotFoundError as error:
        raise ValueError(
            f"Can't find weights for {model_id} in {model_id} or in the Hugging Face Hub: no {name}; {advice}"
        ) from error
