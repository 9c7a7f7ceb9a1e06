"""AutoPeftModel...: load the base model that a saved adapter names, and the adapter on it."""

from __future__ import annotations

import importlib
import os
from typing import Any

from .adapter_state import _on_hub
from .config import PeftConfig
from .peft_api import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
# adapter_config.json names a package to import: only these may be, so that a file cannot run any code.
IMPORT_ALLOWLIST = ("diffusers", "lerobot", "megatron-core", "transformers")


class _BaseAutoPeftModel:
    """Not to be instantiated: use ``from_pretrained``."""

    _target_class: str | None = None
    _target_peft_class: type[PeftModel] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(
            f"{name} is designed to be instantiated using the "
            f"`{name}.from_pretrained(pretrained_model_name_or_path)` or `{name}.from_config(config)` "
            "methods."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model named by the adapter's config, resize it to the adapter's tokenizer, add the
        adapter.

        Args:
            pretrained_model_name_or_path: Adapter folder, or hub repository.
            adapter_name: Its name here.
            is_trainable: Leave it trainable.
            config: See ``PeftModel.from_pretrained``.
            revision: Of the adapter.
            import_allowlist: Packages that ``auto_mapping`` may name.
            kwargs: Of the base model's ``from_pretrained`` and the adapter's.

        Raises:
            ValueError: the adapter is for another task, or names a package that is not allowed.
        """
        path = os.fspath(pretrained_model_name_or_path)
        adapter = PeftConfig.from_pretrained(path, revision=revision, **kwargs)
        target = cls._base_class(adapter, import_allowlist or list(IMPORT_ALLOWLIST))
        base = target.from_pretrained(adapter.base_model_name_or_path, revision=adapter.revision, **kwargs)
        token = kwargs.get("token") or kwargs.get("use_auth_token")
        has_tokenizer = os.path.exists(os.path.join(path, TOKENIZER_CONFIG_NAME)) or (
            not os.path.isdir(path)
            and _on_hub(
                path,
                TOKENIZER_CONFIG_NAME,
                revision=revision,
                repo_type=kwargs.get("repo_type"),
                token=token,
            )
        )
        if has_tokenizer and hasattr(base, "get_input_embeddings"):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                path, revision=revision, token=token, trust_remote_code=kwargs.get("trust_remote_code", False)
            )
            if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
                base.resize_token_embeddings(len(tokenizer))
        return cls._target_peft_class.from_pretrained(
            base,
            path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **kwargs,
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, allowed: list[str]) -> Any:
        if config.task_type is not None:
            if cls._target_class is None:
                raise ValueError(
                    "Cannot use `AutoPeftModel` with a task type, please use a specific class for your task "
                    "type. (e.g. `AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`)"
                )
            expected = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[config.task_type]
            if cls._target_peft_class.__name__ != expected.__name__:
                raise ValueError(
                    f"Expected target PEFT class: {expected.__name__}, but you have asked for: "
                    f"{cls._target_peft_class.__name__} make sure that you are loading the correct model "
                    "for your task type."
                )
            return getattr(importlib.import_module("transformers"), cls._target_class)
        if config.auto_mapping is None:
            raise ValueError(
                "Cannot infer the auto class from the config, please make sure that you are loading the "
                "correct model for your task type."
            )
        library = config.auto_mapping["parent_library"]
        if library not in allowed and not any(library.startswith(f"{name}.") for name in allowed):
            raise ValueError(
                f"The auto mapping wants to import '{library}' which is not in the import allowlist. If you "
                f"are sure that importing this library is safe, specify `import_allowlist=['{library}']` in "
                "`from_pretrained()`."
            )
        return getattr(importlib.import_module(library), config.auto_mapping["base_model_class"])


class AutoPeftModel(_BaseAutoPeftModel):
    """For an adapter without a task type."""


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    """For task type CAUSAL_LM."""

    _target_class = "AutoModelForCausalLM"
    _target_peft_class = PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    """For task type SEQ_2_SEQ_LM."""

    _target_class = "AutoModelForSeq2SeqLM"
    _target_peft_class = PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    """For task type SEQ_CLS."""

    _target_class = "AutoModelForSequenceClassification"
    _target_peft_class = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    """For task type TOKEN_CLS."""

    _target_class = "AutoModelForTokenClassification"
    _target_peft_class = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    """For task type QUESTION_ANS."""

    _target_class = "AutoModelForQuestionAnswering"
    _target_peft_class = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    """For task type FEATURE_EXTRACTION."""

    _target_class = "AutoModel"
    _target_peft_class = PeftModelForFeatureExtraction
