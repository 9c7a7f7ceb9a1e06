"""Turn an adapter into a plain LoRA adapter of another rank: ``convert_to_lora`` and ``save_as_lora``.

For LoRA the factors of the new rank are the SVD of the product, computed from the factors alone. A DoRA
adapter's effect on the weight has full rank; it is approximated as well as the rank allows.
"""

from __future__ import annotations

import copy
import os
import pathlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .adapters import tuner_layers, wrappers
from .auxiliary import ModulesToSaveWrapper
from .combine import pad_rank, svd_of_product
from .config import LoraConfig
from .files import rename_into_place
from .layer_merge import is_transposed, merged_weight, original_weight
from .lora_layer import LoraLayer
from .safetensors_io import DenseTensor, write_file

_PREFIX = "base_model.model."


@torch.no_grad()
def convert_to_lora(
    model: Any,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and tensors (keys as in a file) of a LoRA adapter that does what ``adapter_name`` does.

    Its scaling is 1 everywhere: the old one is in the factors.

    Args:
        model: A PeftModel, or any model with adapted layers; not changed.
        rank: An int is the new rank. A float in (0, 1] is a share of the squared singular values: every
            layer gets the smallest rank that keeps it.
        adapter_name: Which adapter.
        progressbar: Show progress.
        compile_kwargs: PEFT's argument; compiles the conversion of one layer.

    Raises:
        TypeError: no adapted layer, or one without a delta of its weight.
        ValueError: a bad rank, one above a layer's smaller dimension, or an adapter with trained base biases.
    """
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(
            "If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got "
            f"{rank}."
        )
    if rank == 0:
        raise ValueError("Passing a rank of 0 doesn't make sense, please pass a valid value.")
    unsupported = {repr(type(m)) for m in tuner_layers(model) if not m.supports_lora_conversion(adapter_name)}
    if unsupported:
        raise TypeError(
            "Some module types on this model do not support LoRA conversion: "
            f"{', '.join(sorted(unsupported))}."
        )
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and module.has_adapter(adapter_name)
    }
    if not layers:
        raise TypeError("Could not detect any layer that supports LoRA conversion.")
    old: LoraConfig | None = getattr(model, "peft_config", {}).get(adapter_name)
    if old is not None:
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need "
            "for that.",
            stacklevel=2,
        )
        if old.bias != "none":
            raise ValueError(f"The adapter's config sets bias={old.bias}, this is not supported right now.")
    config = _new_config(old, rank)
    convert = torch.compile(_convert, **compile_kwargs) if compile_kwargs is not None else _convert
    tensors: dict[str, Tensor] = {}
    for name, layer in tqdm(layers.items(), disable=not progressbar, desc="Converting to LoRA"):
        A, B = convert(layer, adapter_name, rank)
        _note(config, name.removeprefix(_PREFIX), A.shape[0], rank)
        tensors |= _named(layer, adapter_name, name, A, B)
        config.lora_bias = config.lora_bias or layer.lora_bias.get(adapter_name, False)
    if old is not None and old.modules_to_save:
        config.modules_to_save = copy.copy(old.modules_to_save)
        tensors |= _trained_modules(model, adapter_name)
    return config, tensors


def save_as_lora(
    path: str | os.PathLike[str],
    model: Any,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """``convert_to_lora`` into the adapter folder ``path``, which is made when missing.

    Raises:
        TypeError, ValueError: see ``convert_to_lora``.
    """
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "adapter_model.safetensors"
    temporary = weights.with_name(weights.name + ".tmp")
    write_file(temporary, [DenseTensor(key, tensor) for key, tensor in tensors.items()], {"format": "pt"})
    rename_into_place(temporary, weights)
    config.save_pretrained(str(folder))


def cutoff_index(S: Tensor, threshold: float) -> int:
    """How many of the singular values, largest first, hold ``threshold`` of the squared sum; at least 1."""
    energy = torch.cumsum(S.double().square(), 0)
    count = int(torch.searchsorted(energy, threshold * energy[-1]).item()) + 1
    return min(count, S.shape[0])


def _new_config(old: LoraConfig | None, rank: int | float) -> LoraConfig:
    r = rank if isinstance(rank, int) else 1  # 1 stands for nothing: every layer has an entry in the patterns
    if old is None:
        return LoraConfig(r=r, lora_alpha=r, target_modules=[])
    targets = old.target_modules
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=targets if isinstance(targets, str) else sorted(targets or ()),
        exclude_modules=copy.copy(old.exclude_modules),
        layers_pattern=old.layers_pattern,
        layers_to_transform=old.layers_to_transform,
        base_model_name_or_path=old.base_model_name_or_path,
        task_type=old.task_type,
        fan_in_fan_out=old.fan_in_fan_out,
    )


def _note(config: LoraConfig, name: str, own_rank: int, rank: int | float) -> None:
    if own_rank != rank or isinstance(config.target_modules, str):
        config.rank_pattern[name] = config.alpha_pattern[name] = own_rank
    if isinstance(config.target_modules, set):
        config.target_modules.add(name)


def _convert(layer: LoraLayer, adapter: str, rank: int | float) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) at scaling 1, in the old factors' dtype."""
    base: Any = layer.get_base_layer()
    if getattr(base, "groups", 1) > 1:
        raise TypeError("a grouped convolution's adapter is several low-rank maps and cannot be converted")
    A, B = layer.get_factors(adapter)
    if layer.use_dora.get(adapter, False):
        delta = merged_weight(layer, [adapter], None) - original_weight(layer)
        delta = delta.t() if is_transposed(layer) else delta.flatten(1)  # (out, in)
        U, S, Vh = torch.linalg.svd(delta.float(), full_matrices=False)
    else:
        U, S, Vh = svd_of_product(float(layer.scaling[adapter]) * B.float(), A.float())
    limit = min(B.shape[0], A.shape[1])
    own = rank if isinstance(rank, int) else cutoff_index(S, rank)
    if own > limit:
        raise ValueError(
            f"The chosen rank {own} is larger than the weight shape ({limit}), please choose a lower rank."
        )
    new_A, new_B = Vh[:own], U[:, :own] * S[:own]
    new_A, new_B = pad_rank(new_A, own, dim=0), pad_rank(new_B, own, dim=1)
    return new_A.to(A.dtype).contiguous(), new_B.to(B.dtype).contiguous()


def _named(layer: LoraLayer, adapter: str, name: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    if adapter in layer.lora_embedding_A:
        return {f"{name}.lora_embedding_A": A, f"{name}.lora_embedding_B": B}
    old_A, old_B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    tensors = {
        f"{name}.lora_A.weight": A.reshape(-1, *old_A.shape[1:]),
        f"{name}.lora_B.weight": B.reshape(old_B.shape[0], -1, *old_B.shape[2:]),
    }
    if layer.lora_bias.get(adapter, False):
        bias = layer.lora_B[adapter].bias
        tensors[f"{name}.lora_B.bias"] = (bias * float(layer.scaling[adapter])).to(bias.dtype)
    return tensors


def _trained_modules(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    paths = {id(module): name for name, module in model.named_modules()}
    tensors = {}
    for wrapper in wrappers(model):
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter in wrapper.modules_to_save:
            for key, tensor in wrapper.modules_to_save[adapter].state_dict().items():
                tensors[f"{paths[id(wrapper)]}.{key}"] = tensor.detach().clone()
    return tensors
