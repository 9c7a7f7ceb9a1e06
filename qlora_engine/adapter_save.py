"""Write a PeftModel's adapters as PEFT's folders, with a fingerprint of the quantised base beside them."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter_io import write_adapter
from .adapter_state import get_peft_model_state_dict, load_peft_weights
from .base_match import base_fingerprint
from .config import LoraConfig, PeftConfig, __version__
from .files import write_text
from .safetensors_io import DenseTensor


def save_adapters(
    model: Any,
    save_directory: str | os.PathLike[str],
    *,
    selected_adapters: list[str],
    save_embedding_layers: bool | str,
    state_dict: dict[str, Tensor] | None,
    initial: str | os.PathLike[str] | None,
    is_main_process: bool,
) -> None:
    """Write every selected adapter; "default" into the folder itself, others into a folder of their name.

    Args:
        model: A PeftModel.
        save_directory: Folder.
        selected_adapters: Names.
        save_embedding_layers: See ``get_peft_model_state_dict``.
        state_dict: Of ``model``, if the caller had to gather it.
        initial: Folder of the adapter as it was initialised: write a plain LoRA of what training changed.
        is_main_process: False: gather, but write nothing.
    """
    folder = Path(save_directory)
    fingerprint = base_fingerprint(model.get_base_model()) if is_main_process else None
    for name in selected_adapters:
        tensors = get_peft_model_state_dict(
            model, state_dict=state_dict, adapter_name=name, save_embedding_layers=save_embedding_layers
        )
        if not is_main_process:
            continue
        config = _config_to_save(model, model.peft_config[name])
        if initial is not None:
            tensors = _difference_to(tensors, config, initial)
        target = folder if name == "default" else folder / name
        write_adapter(target, _writable(tensors), config, fingerprint)


def _config_to_save(model: Any, config: PeftConfig) -> LoraConfig:
    """What adapter_config.json says: for inference, and with no initialisation that has been done already."""
    base = model.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    saved: Any = copy.copy(config)
    saved.inference_mode = True
    if saved.init_lora_weights == "loftq":
        # The base is solved and saved with it; "loftq" in the file would solve it once more at loading.
        saved.init_lora_weights, saved.loftq_config = True, {}
    if saved.task_type is None:
        saved.auto_mapping = {
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
        }
    return saved  # type: ignore[no-any-return]


def _writable(tensors: dict[str, Tensor]) -> list[DenseTensor]:
    return [DenseTensor(name, tensor.detach().cpu().contiguous()) for name, tensor in sorted(tensors.items())]


def _difference_to(
    tensors: dict[str, Tensor], config: Any, initial: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """``s B A - s B0 A0`` as one LoRA: A' = [A; A0], B' = [B, -B0] at twice the rank; changes ``config``.

    It applies to the weights as they were before PiSSA, OLoRA or LoftQ took their part out of them.

    Raises:
        ValueError: rank-stabilised scaling with patterns: no single factor restores it.
    """
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when "
            "using `rank_pattern` or `alpha_pattern` at the same time as `use_rslora=True`."
        )
    before = load_peft_weights(initial)
    result = {}
    for name, tensor in tensors.items():
        if "lora_A" in name:
            result[name] = torch.cat([tensor.cpu(), before[name].to(tensor.dtype)], dim=0)
        elif "lora_B" in name:
            result[name] = torch.cat([tensor.cpu(), -before[name].to(tensor.dtype)], dim=1)
    config.init_lora_weights = True
    config.r *= 2
    # alpha / r stays the same with both doubled, alpha / sqrt(r) with alpha times sqrt(2).
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    config.rank_pattern = {key: 2 * value for key, value in config.rank_pattern.items()}
    config.alpha_pattern = {key: 2 * value for key, value in config.alpha_pattern.items()}
    return result


def write_model_card(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write README.md, or bring its metadata up to date: library, base model, tags, version."""
    from huggingface_hub import ModelCard

    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard("---\n{}\n---\n\n# LoRA adapter\n")
    base = model.get_base_model()
    name = getattr(base, "name_or_path", None)
    tags = {*(getattr(base, "model_tags", None) or []), "lora"}
    if hasattr(base, "config") and type(base).__module__.startswith("transformers."):
        tags.add("transformers")
    if hasattr(base, "name_or_path"):
        tags.add(f"base_model:adapter:{name}")
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted(tags)
    if name:
        card.data["base_model"] = name
    if not card.data.get("pipeline_tag") and type(model).__name__ == "PeftModelForCausalLM":
        card.data["pipeline_tag"] = "text-generation"
    heading, line = "### Framework versions", f"- PEFT {__version__}"
    lines = card.text.splitlines()
    if line not in lines:
        if heading in lines:
            lines.insert(lines.index(heading) + 2, line)
        else:
            lines += ["", heading, "", line]
    card.text = "\n".join(lines) + "\n"
    write_text(path, str(card))
