"""qlora-engine: low-bit bases with LoRA factors that correct them.

In memory, with PEFT's names:

    config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights="loftq",
                        loftq_config=LoftQConfig(loftq_bits=4, loftq_iter=5))
    model = get_peft_model(model, config)   # Linears are 4-bit now, with factors that correct them
    print(error_report(model))              # relative error by layer, without and with the factors

On disk, by the commands: loftq-init, qlora-finetune, qlora-merge, qlora-report (each has --help).

What to look up with help(qlora_engine.NAME):

    what to do       LoraConfig LoftQConfig EvaConfig CordaConfig LoraGAConfig get_peft_config
    put adapters on  get_peft_model inject_adapter_in_model PeftModel replace_lora_weights_loftq
    load             from_pretrained PeftModel AutoPeftModel load_peft_weights hotswap_adapter
    calibrate        load_texts calibrate Calibration
    prepare          prepare_model_for_kbit_training cast_mixed_precision_params quantize_experts
    see              error_report get_layer_status get_model_status inspect_matched_modules
    change           convert_to_lora save_as_lora reduce_intruder_dimension rescale_adapter_scale

Names are loaded when they are first used, so that importing the package is light; dir(qlora_engine) lists
them all. The quantisation layer by itself is the package ``quant``: help(quant).
"""

from __future__ import annotations

import importlib
from typing import Any

from . import transformers_hook

__version__ = "0.1.0"

_HOME: dict[str, str] = {
    name: module
    for module, names in {
        "config": "LoraConfig LoftQConfig PeftConfig PeftType TaskType PeftWarning EvaConfig CordaConfig "
        "LoraGAConfig "
        "LoraRuntimeConfig PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING get_peft_config",
        "targets": "NoMatchingPeftModuleError PeftError",
        "tuner_layer": "BaseTunerLayer",
        "loading": "from_pretrained",
        "compute": "set_compute",
        "lora_layer": "LoraLayer",
        "lora": "LoraLinear LoraEmbedding",
        "lora_conv": "LoraConv1d LoraConv2d LoraConv3d",
        "dora": "DoraCaching",
        "auxiliary": "AuxiliaryTrainingWrapper ModulesToSaveWrapper",
        "trainable_tokens": "TrainableTokensWrapper",
        "attach": "LoraModel inject_adapter_in_model inspect_matched_modules PEFT_TYPE_TO_TUNER_MAPPING",
        "lora_param": "ParamWrapper",
        "lora_attention": "MultiheadAttention",
        "eva": "get_eva_state_dict initialize_lora_eva_weights",
        "expert_quantize": "quantize_experts",
        "kbit": "prepare_model_for_kbit_training cast_mixed_precision_params",
        "status": "get_layer_status get_model_status TunerLayerStatus TunerModelStatus",
        "hotswap": "hotswap_adapter hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap",
        "helpers": "check_if_peft_model rescale_adapter_scale disable_input_dtype_casting "
        "find_kappa_target_modules",
        "conversion": "convert_to_lora save_as_lora",
        "intruders": "reduce_intruder_dimension",
        "loftq_replace": "replace_lora_weights_loftq",
        "peft_api": "get_peft_model PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction "
        "PeftModelForQuestionAnswering PeftModelForSeq2SeqLM PeftModelForSequenceClassification "
        "PeftModelForTokenClassification MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        "auto": "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction "
        "AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification "
        "AutoPeftModelForTokenClassification",
        "adapter_state": "get_peft_model_state_dict set_peft_model_state_dict load_peft_weights",
        "base_state": "get_base_model_state_dict set_base_model_state_dict",
        "compare": "error_report",
        "texts": "load_texts",
        "calibration": "Calibration calibrate",
        "blockwise": "walk_blocks",
    }.items()
    for name in names.split()
}

__all__ = sorted(_HOME)


transformers_hook.install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
