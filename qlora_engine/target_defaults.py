"""Modules that are adapted by default, by model type (PEFT 0.21's table: names are facts)."""

from __future__ import annotations

_BY_TARGETS: tuple[tuple[str, list[str]], ...] = (
    ("t5 mt5", ["q", "v"]),
    ("bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm", ["q_proj", "v_proj"]),
    ("gemma gemma2 gemma3_text qwen2 qwen3", ["q_proj", "v_proj"]),
    ("bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon", ["query_key_value"]),
    ("bert roberta xlm-roberta electra layoutlm", ["query", "value"]),
    ("gpt2 gpt_bigcode", ["c_attn"]),
    ("blip-2", ["q", "v", "q_proj", "v_proj"]),
    ("deberta-v2", ["query_proj", "value_proj"]),
    ("deberta", ["in_proj"]),
    ("mpt", ["Wqkv"]),
    ("btlm", ["c_proj", "c_attn"]),
    ("codegen", ["qkv_proj"]),
    ("phi", ["q_proj", "v_proj", "fc1", "fc2"]),
    ("nemotron_h", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ("rwkv", ["key", "value", "receptance", "output"]),
    ("rwkv7", ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"]),
)

TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING: dict[str, list[str] | str] = {
    model_type: list(targets) for types, targets in _BY_TARGETS for model_type in types.split()
}
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["gemma4"] = r".*language_model\..*\.(q_proj|v_proj)"
