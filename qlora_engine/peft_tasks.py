"""The PeftModels of the tasks: what each one's forward names, and which head trains with the adapter."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .config import LoraConfig
from .peft_model import PeftModel


class _WithHead(PeftModel):
    """A PeftModel whose head always trains and is saved with the adapter."""

    _head_names: tuple[str, ...] = ()

    def __init__(
        self, model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        self._add_head(peft_config)
        super().__init__(model, peft_config, adapter_name, **kwargs)
        for name, _ in self.get_base_model().named_children():
            if any(head in name for head in self.modules_to_save or ()):
                self.cls_layer_name = name
                break

    def _add_head(self, config: LoraConfig) -> None:
        names = list(config.modules_to_save or ())
        config.modules_to_save = names + [name for name in self._head_names if name not in names]

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig, *args: Any, **kwargs: Any) -> None:
        """As PeftModel's; the new adapter, too, brings its own head."""
        self._add_head(peft_config)
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)


class PeftModelForSequenceClassification(_WithHead):
    """Trains ``classifier`` or ``score`` with the adapter."""

    _head_names = ("classifier", "score")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The adapted model's forward; the names are there for what inspects them."""
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            **kwargs,
        )


class PeftModelForTokenClassification(PeftModelForSequenceClassification):
    """Trains ``classifier`` or ``score`` with the adapter."""


class PeftModelForQuestionAnswering(_WithHead):
    """Trains ``qa_outputs`` with the adapter."""

    _head_names = ("qa_outputs",)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The adapted model's forward; the names are there for what inspects them."""
        if token_type_ids is not None:
            kwargs["token_type_ids"] = token_type_ids
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            **kwargs,
        )


class _Generating(PeftModel):
    """Hands ``generation_config`` set on the wrapper to the model that generates."""

    def __init__(
        self, model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.base_model_prepare_inputs_for_generation = self.base_model.prepare_inputs_for_generation

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's ``generate``; ``adapter_names`` gives every row of the batch its adapter."""
        own = self.__dict__.get("generation_config")
        if own is not None:
            self.get_base_model().generation_config = own
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's."""
        return self.base_model_prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForCausalLM(_Generating):
    """A causal language model with adapters."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The adapted model's forward; the names are there for what inspects them."""
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds  # not every architecture (MPT) takes it
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            **kwargs,
        )


class PeftModelForSeq2SeqLM(_Generating):
    """An encoder-decoder language model with adapters."""

    def __init__(
        self, model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)
        prepare = getattr(self.base_model, "_prepare_encoder_decoder_kwargs_for_generation", None)
        self.base_model_prepare_encoder_decoder_kwargs_for_generation = prepare

    def generate(self, **kwargs: Any) -> Any:
        """The adapted model's ``generate``; as PEFT's it takes keywords only: the first argument could be
        meant for the encoder or for the decoder."""
        return super().generate(**kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The adapted model's forward; the names are there for what inspects them."""
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            **kwargs,
        )


class PeftModelForFeatureExtraction(PeftModel):
    """A model whose hidden states are the result, with adapters."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The adapted model's forward; the names are there for what inspects them."""
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            **kwargs,
        )


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str | None, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}
