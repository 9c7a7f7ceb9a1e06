"""get_peft_model, and the PeftModels under PEFT's names."""

from __future__ import annotations

import warnings

from torch import nn

from .config import LoraConfig
from .peft_model import PeftModel, warn_about_name
from .peft_tasks import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .tuner_layer import BaseTunerLayer

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "get_peft_model",
    "warn_about_name",
]


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Adapt ``model`` in place and return the PeftModel around it.

    With ``init_lora_weights="loftq"`` every targeted layer is quantised in place as it is adapted, and its
    dense weight released: at no time do the model and a quantised copy of it exist together.

    Args:
        model: Any module; dense, quantised here, or loaded by transformers with bitsandbytes.
        peft_config: What to adapt and how; ``base_model_name_or_path`` is set to the model's.
        adapter_name: Name of the adapter.
        mixed: Must be False: there is one adapter type.
        autocast_adapter_dtype: Keep half-precision adapters in float32, as training needs.
        revision: Of the base model, for the config.
        low_cpu_mem_usage: Make the adapter's weights on the meta device, to be loaded.

    Raises:
        NoMatchingPeftModuleError: the config chooses no module.
        ValueError: ``mixed``, or a layer refuses the config.
    """
    old = peft_config.base_model_name_or_path
    new = model.__dict__.get("name_or_path") or None
    peft_config.base_model_name_or_path = new
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model "
            "with a different config, make sure to call `.unload()` before.",
            stacklevel=2,
        )
    if old is not None and old != new:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{old}' to '{new}'. "
            "Please ensure that the correct base model is loaded when loading this checkpoint.",
            stacklevel=2,
        )
    if revision is not None:
        if peft_config.revision is not None and peft_config.revision != revision:
            warnings.warn(
                f"peft config has already set base model revision to {peft_config.revision}, overwriting "
                f"with revision {revision}",
                stacklevel=2,
            )
        peft_config.revision = revision
    if (
        isinstance(peft_config, LoraConfig)
        and peft_config.init_lora_weights == "eva"
        and not low_cpu_mem_usage
    ):
        warnings.warn(
            "lora with eva initialization used with low_cpu_mem_usage=False. "
            "Setting low_cpu_mem_usage=True can improve the maximum batch size possible for eva "
            "initialization.",
            stacklevel=2,
        )
    warn_about_name(adapter_name, peft_config)
    if mixed:
        raise ValueError("mixed=True: there is only LoRA here, nothing to mix")
    target = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, PeftModel)
    return target(
        model,
        peft_config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
