"""Solve for an adapter's factors on a base that is quantised already, from the original weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from quant.linear import QuantEmbedding, QuantLinear

from .base_weight import dense_weight, is_quantized
from .checkpoint import WEIGHTS_FILE, Checkpoint
from .lora_layer import LoraLayer
from .lowrank import LowRankFactors, truncated_svd
from .safetensors_io import TensorEntry, read_header

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Replacement:
    """What was done to one layer; errors are ``||W - (base + scaling B A)|| / ||W||``, Frobenius.

    Attributes:
        name: Path of the layer in the base model.
        error_base: Without an adapter.
        error: With the new factors.
        kept: Whether the new factors stayed (the callback may refuse them).
    """

    name: str
    error_base: float
    error: float
    kept: bool


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
    *,
    svd: str = "fast",
    progressbar: bool = False,
) -> list[Replacement]:
    """Give every quantised layer the factors that best correct its error: LoftQ's step with Q held fixed.

    One original weight is in memory at a time. The layer's scaling is divided out, the factors keep their
    dtype, and DoRA magnitudes become the norms of the corrected weight. Nothing changes if a weight is
    missing.

    Args:
        peft_model: A PeftModel whose base is quantised, in any of our formats or by bitsandbytes.
        model_path: The original, full-precision checkpoint: a folder, or its ``model.safetensors``.
            Default: the folder or cached hub repository that the base model was loaded from.
        adapter_name: The adapter to solve for.
        callback: Called with the model and the layer's name after each layer; a false answer takes the
            layer's new factors back. To see whether the model as a whole got better, for example.
        svd: "fast" (the residual is within 0.1 % of the best) or "exact".
        progressbar: Show progress.

    Returns:
        What was done, in the order of the layers.

    Raises:
        ValueError: no quantised LoRA layer with that adapter, a merged one, or an original weight that is
            missing, of another shape, or not to be found.
        TypeError: not a PeftModel.
        FileNotFoundError: no safetensors file there.
    """
    layers: dict[str, LoraLayer] = {}
    for name, module in peft_model.named_modules():
        if not isinstance(module, LoraLayer) or not module.has_adapter(adapter_name):
            continue
        if module.merged:
            raise ValueError(f"{name} has merged adapters; unmerge them first")
        if not is_quantized(module.get_base_layer()):
            continue
        if not name.startswith(_PREFIX):
            raise TypeError("The passed model does not appear to be a valid PeftModel")
        layers[name.removeprefix(_PREFIX)] = module
    if not layers:
        raise ValueError(
            f"No bnb LoRA module found on the model, nor any other quantised one with {adapter_name!r}"
        )
    entries = _entries(_folder(peft_model, model_path), peft_model, layers)
    done = []
    for name, layer in tqdm(layers.items(), disable=not progressbar, desc="Solving for LoRA weights"):
        before = [tensor.clone() for tensor in _tensors(layer, adapter_name)]
        error_base, error = _solve(layer, adapter_name, entries[name], svd)
        kept = False
        try:
            kept = callback is None or bool(callback(peft_model, name))
        finally:  # also if the callback raises
            if not kept:
                for tensor, old in zip(_tensors(layer, adapter_name), before):
                    tensor.copy_(old)
        done.append(Replacement(name, error_base, error, kept))
    return done


def _tensors(layer: LoraLayer, adapter: str) -> list[Tensor]:
    """What solving changes."""
    found = list(layer.get_factors(adapter))
    if adapter in layer.lora_magnitude_vector:
        found.append(layer.lora_magnitude_vector[adapter].weight)
    return found


def _solve(layer: LoraLayer, adapter: str, entry: TensorEntry, svd: str) -> tuple[float, float]:
    """Set the factors; the relative errors without and with them."""
    base: Any = layer.get_base_layer()
    own_A, own_B = layer.get_factors(adapter)
    weight = entry.read().to(own_A.device, torch.float32)
    weight = weight.t() if isinstance(base, QuantLinear) and base.conv1d else weight
    residual = weight - dense_weight(base).to(weight)
    size, error_base = weight.norm(), residual.norm()
    if isinstance(base, QuantEmbedding):
        residual = residual.t()  # an embedding's product B A is (width, rows)
    rank, scaling = own_A.shape[0], float(layer.scaling[adapter])
    U, S, Vh = truncated_svd(residual, min(rank, *residual.shape), method=svd)
    factors = LowRankFactors.from_svd(U, S, Vh).divided(scaling)
    for own, value in ((own_A, factors.A), (own_B, factors.B)):
        own.zero_()
        own[: value.shape[0], : value.shape[1]].copy_(value)
    layer.refresh_magnitude(adapter)
    left = residual - scaling * (own_B.float() @ own_A.float())
    return (error_base / size).item(), (left.norm() / size).item()


def _folder(peft_model: Any, model_path: str | os.PathLike[str] | None) -> Path:
    """The folder that holds the original weights."""
    if model_path is not None:
        path = Path(model_path)
        return path.parent if path.name == WEIGHTS_FILE else path
    name = getattr(getattr(peft_model.get_base_model(), "config", None), "_name_or_path", None)
    if not name:
        raise ValueError(
            "The provided model does not appear to be a transformers model or is a local model. In this "
            "case, you must pass the model_path argument that points to the safetensors file."
        )
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except HFValidationError as error:
        raise ValueError(
            "The provided model does not appear to be a transformers model or is a local model. In this "
            "case, you must pass the model_path argument that points to the safetensors file."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            "The model.safetensors file must be present on disk, but it could not be found."
        ) from error


def _entries(folder: Path, peft_model: Any, layers: Mapping[str, LoraLayer]) -> dict[str, TensorEntry]:
    """The original weight of every layer, checked before anything changes."""
    if (folder / "config.json").is_file():
        tensors = Checkpoint.open(folder).tensors
    elif (folder / WEIGHTS_FILE).is_file():
        tensors = read_header(folder / WEIGHTS_FILE)[0]
    else:
        raise FileNotFoundError(
            f"Could not find file for {folder / WEIGHTS_FILE}, ensure that there is a (sharded) safetensors "
            "file of the model."
        )
    prefix = getattr(peft_model.get_base_model(), "base_model_prefix", None) or ""
    found = {}
    for name, layer in layers.items():
        names = (f"{name}.weight", f"{name.removeprefix(prefix + '.')}.weight", f"{prefix}.{name}.weight")
        entry = next((tensors[key] for key in names if key in tensors), None)
        if entry is None:
            raise ValueError(f"{folder} has no tensor '{name}.weight'; is it the model that was quantised?")
        base: Any = layer.get_base_layer()
        shape = tuple(base.shape) if hasattr(base, "shape") else (base.out_features, base.in_features)
        expected = shape[::-1] if getattr(base, "conv1d", False) else shape
        if entry.shape != expected or entry.dtype not in ("F16", "BF16", "F32"):
            raise ValueError(
                f"{folder}: '{entry.name}' is {entry.dtype} {entry.shape}; the full-precision weight "
                f"{expected} is needed"
            )
        found[name] = entry
    return found
