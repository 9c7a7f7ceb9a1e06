"""PeftModel and get_peft_model: PEFT's names for what ``attach``, ``adapter_state`` and ``merging`` do."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import PushToHubMixin

from quant.linear import QuantizedModule

from .adapter_save import base_fingerprint, save_adapters, write_model_card
from .adapter_state import load_peft_weights, set_peft_model_state_dict
from .adapters import lora_layers, tuner_layers, wrappers
from .attach import LoraModel
from .config import PEFT_TYPE_TO_PREFIX_MAPPING, LoraConfig, PeftConfig
from .fingerprint import FINGERPRINT_FILE, Fingerprint
from .tuner_layer import BaseTunerLayer, as_names

_CHANGES_BASE = ("pissa", "corda", "olora")


class PeftModel(PushToHubMixin, nn.Module):
    """A model with adapters, and everything one does with them.

    Attributes that it does not have are the LoraModel's, and then the base model's.

    Args:
        model: The model to adapt, in place.
        peft_config: What to adapt and how.
        adapter_name: Name of the first adapter.
        autocast_adapter_dtype: Keep half-precision adapters in float32, as training needs.
        low_cpu_mem_usage: Make the adapter's weights on the meta device, to be loaded.

    Attributes:
        base_model: The LoraModel.
        peft_config: Configs by adapter name.
        active_adapter: Name (or names) of the active adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self.active_adapter: str | list[str] = adapter_name
        self.peft_type = peft_config.peft_type
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._is_prompt_learning = False
        self._adapters_disabled = False
        self.base_model = LoraModel(
            model, {adapter_name: peft_config}, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
        )
        self._cast(adapter_name, autocast_adapter_dtype)
        # transformers 5 renamed the flag and warns about the old name; other models have neither.
        flags = ("is_activation_checkpointing", "is_gradient_checkpointing")
        if next((getattr(model, flag) for flag in flags if hasattr(type(model), flag)), True):
            self.prepare_model_for_gradient_checkpointing(model)
        base_config: Any = getattr(model, "config", None)
        if hasattr(base_config, "pretraining_tp"):  # simulated tensor parallelism would bypass the layers
            base_config.pretraining_tp = 1

    def _cast(self, adapter_name: str, autocast_adapter_dtype: bool) -> None:
        self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype and self.peft_config[adapter_name].use_dora:
            # The magnitudes were rounded to the base's dtype; set them again so that DoRA starts as an
            # identity.
            for layer in lora_layers(self.base_model.model):
                layer.refresh_magnitude(adapter_name)

    # ---- state

    @property
    def peft_config(self) -> dict[str, Any]:
        """Configs by adapter name."""
        return self.base_model.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        self.base_model.peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        """The active names as a list."""
        return self.base_model.active_adapters

    @property
    def active_peft_config(self) -> Any:
        """The active adapter's config (the first one's, if several are active)."""
        return self.peft_config[as_names(self.active_adapter)[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether adapters are enabled, or none is active."""
        return not self._adapters_disabled or not self.active_adapters

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names in any adapter's ``modules_to_save``; None if there are none."""
        names = {
            name for c in self.peft_config.values() for name in getattr(c, "modules_to_save", None) or ()
        }
        return names or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's dtype."""
        return getattr(self.base_model, "dtype", None)

    def get_base_model(self) -> Any:
        """The adapted model itself, without the wrappers around it."""
        return self.base_model.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not initialised yet: nothing to ask
                raise
            return getattr(self.base_model, name)

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> None:
        """Let the embeddings' output require gradients: checkpoints of frozen layers need one input that
        does."""
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))

    # ---- running

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if not self.has_active_enabled_adapter:
            yield
            return
        with self.base_model._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def _without_special(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in kwargs.items() if key not in self.special_peft_forward_args}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's forward; ``adapter_names`` gives every row of the batch its adapter."""
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.get_base_model()(*args, **self._without_special(kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's ``generate``; ``adapter_names`` as in ``forward``."""
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.get_base_model().generate(*args, **self._without_special(kwargs))

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is the base model; it nests, and restores what was on and what
        trains."""
        base = self.get_base_model()
        switched: list[Any] = [*tuner_layers(base), *wrappers(base)]
        states = {module.disable_adapters for module in switched}
        if len(states) > 1:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. "
                "This is most likely unintentional. After exiting the disable_adapter context, all adapters "
                "will be enabled",
                stacklevel=3,
            )
        trains = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
        was_disabled = self._adapters_disabled
        try:
            self.base_model.disable_adapter_layers()
            self._adapters_disabled = True
            yield
        finally:
            if states != {True}:
                self.base_model.enable_adapter_layers()
            for parameter, requires_grad in trains:
                parameter.requires_grad = requires_grad
            self._adapters_disabled = was_disabled

    # ---- adapters

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make one adapter the active one, trainable unless ``inference_mode``.

        Raises:
            ValueError: no such adapter.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} not found.")
        self.active_adapter = adapter_name
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the weights of these adapters train, or not."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a new adapter; it is not active yet.

        Args:
            adapter_name: A name that is not taken.
            peft_config: What to adapt and how.
            low_cpu_mem_usage: Make its weights on the meta device, to be loaded.
            autocast_adapter_dtype: Keep it in float32 where the base has half precision.

        Raises:
            ValueError: the name is taken, or the config does not fit the adapters that are there; nothing of
                the new adapter is left then.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        warn_about_name(adapter_name, peft_config)
        if peft_config.peft_type != self.peft_type:
            raise ValueError(
                "Cannot combine adapters with different peft types. "
                f"Found {self.peft_type} and {peft_config.peft_type}."
            )
        try:
            self.peft_config[adapter_name] = peft_config
            self.base_model.inject_adapter(
                self.get_base_model(), adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
            )
        except Exception:
            self._roll_back(adapter_name)
            raise
        self._cast(adapter_name, autocast_adapter_dtype)

    def _roll_back(self, adapter_name: str) -> None:
        """Take what was added of a new adapter away again, and layers that have no other adapter."""
        self.peft_config.pop(adapter_name, None)
        base = self.get_base_model()
        for name, module in list(base.named_modules()):
            if isinstance(module, BaseTunerLayer) and adapter_name in module._get_available_adapters():
                module.delete_adapter(adapter_name)
                if not module._get_available_adapters():
                    parent, _, child = name.rpartition(".")
                    setattr(base.get_submodule(parent), child, module.base_layer)
        for wrapper in wrappers(base):
            wrapper.delete_adapter(adapter_name, new_active_adapters=self.active_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter.

        Raises:
            ValueError: no such adapter, or it is merged.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        self.base_model.delete_adapter(adapter_name)
        if len(self.active_adapters) == 1:
            self.active_adapter = self.active_adapters[0]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a delta of the weights: always."""
        return all(layer.supports_lora_conversion(adapter_name) for layer in tuner_layers(self))

    # ---- counting and status

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable parameters, all parameters); a quantised weight counts as the dense one it stands
        for."""
        trainable = total = 0
        packed: set[int] = set()
        for module in self.modules():
            if isinstance(module, QuantizedModule):
                total += module.shape.numel()
                packed.update(id(p) for name, p in module.named_parameters(recurse=False) if name != "bias")
        for parameter in self.parameters():
            if id(parameter) in packed:
                continue
            count = parameter.numel() or getattr(parameter, "ds_numel", 0)
            if type(parameter).__name__ == "Params4bit":
                count *= 2 * parameter.element_size()
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """Print the counts and the share that trains."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> Any:
        """See ``status.get_layer_status``."""
        from .status import get_layer_status

        return get_layer_status(self)

    def get_model_status(self) -> Any:
        """See ``status.get_model_status``."""
        from .status import get_model_status

        return get_model_status(self)

    # ---- files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters as PEFT does, with a fingerprint of a quantised base beside them.

        Args:
            save_directory: Folder; made when missing. Adapters not called "default" get a folder in it.
            safe_serialization: Must be True: pickles are not written.
            selected_adapters: Names; default: all.
            save_embedding_layers: Save embedding and head in full: True, False, or "auto".
            is_main_process: False writes nothing.
            path_initial_model_for_weight_conversion: The adapter as it was initialised by PiSSA, OLoRA or
                LoftQ: save what training changed, as a plain LoRA for the original weights.
            kwargs: ``state_dict``, if it had to be gathered.

        Raises:
            ValueError: a file in the way, an unknown adapter, or ``safe_serialization=False``.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle; only safetensors are written")
        known = list(self.peft_config)
        selected = known if selected_adapters is None else selected_adapters
        if any(name not in known for name in selected):
            raise ValueError(
                "You passed an invalid `selected_adapters` arguments, current supported adapter names are"
                f" {known} - got {selected}."
            )
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            self.create_or_update_model_card(save_directory)
        save_adapters(
            self,
            save_directory,
            selected_adapters=selected,
            save_embedding_layers=save_embedding_layers,
            state_dict=kwargs.get("state_dict"),
            initial=path_initial_model_for_weight_conversion,
            is_main_process=is_main_process,
        )

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write README.md, or update its metadata."""
        write_model_card(self, output_dir)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a saved adapter on ``model``.

        Args:
            model: The base, changed in place.
            model_id: Adapter folder, or hub repository.
            adapter_name: Its name here.
            is_trainable: Leave it trainable; otherwise it is frozen and the model is in eval mode.
            config: Instead of the saved one.
            autocast_adapter_dtype: Keep it in float32 where the base has half precision.
            ephemeral_gpu_offload: Kept in the runtime config; nothing here is offloaded.
            low_cpu_mem_usage: Do not initialise what is loaded anyway.
            key_mapping: See ``load_peft_weights``.
            kwargs: ``torch_device``, ``subfolder``, ``revision``, ``token``, ``cache_dir`` ...

        Raises:
            ValueError: ``config`` is no PeftConfig, or the files are missing.
        """
        if config is None:
            loaded = _load_config(model_id, kwargs)
        elif isinstance(config, PeftConfig):
            loaded = config
        else:
            raise ValueError(f"The input config must be a PeftConfig, got {config.__class__}")
        loaded.inference_mode = not is_trainable
        loaded.runtime_config.ephemeral_gpu_offload = ephemeral_gpu_offload
        if key_mapping is None:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", {})
        target = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(loaded.task_type, cls)
        peft_model = target(
            model,
            _not_solved_again(loaded, model_id),
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
        result = peft_model.load_adapter(
            model_id,
            adapter_name,
            is_trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=key_mapping,
            **kwargs,
        )
        if result.missing_keys:
            message = f"Found missing adapter keys while loading the checkpoint: {result.missing_keys}."
            prefix = PEFT_TYPE_TO_PREFIX_MAPPING[loaded.peft_type]
            if adapter_name in prefix:
                message = (
                    f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. "
                    "This could be the potential reason for missing adapter keys. " + message
                )
            warnings.warn(message, stacklevel=2)
        return peft_model

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a saved adapter under a new name (not active yet), or into the adapter of that name.

        Args:
            model_id: Adapter folder, or hub repository.
            adapter_name: Its name here.
            is_trainable: Leave it trainable; otherwise it is frozen and the model goes into eval mode.
            torch_device: Where to load the tensors first; default: the CPU.
            autocast_adapter_dtype: Keep it in float32 where the base has half precision.
            ephemeral_gpu_offload: Unused: nothing here is offloaded.
            low_cpu_mem_usage: Do not initialise what is loaded anyway.
            key_mapping: See ``load_peft_weights``.
            kwargs: ``ignore_mismatched_sizes`` and hf_hub_download's.

        Returns:
            A named tuple of ``missing_keys`` (of this adapter) and ``unexpected_keys``.

        Raises:
            ValueError: the files are missing, or the config does not fit.
            RuntimeError: a tensor of another shape.
        """
        hub_kwargs, kwargs = self._split_kwargs(kwargs)
        added = adapter_name not in self.peft_config
        if added:
            config = _load_config(model_id, hub_kwargs)
            self._check_new_adapter_config(config, is_trainable=is_trainable)
            config.inference_mode = not is_trainable
            self.add_adapter(
                adapter_name,
                _not_solved_again(config, model_id),
                low_cpu_mem_usage=low_cpu_mem_usage,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )
            if is_trainable:
                self.set_requires_grad(adapter_name)
        try:
            tensors = load_peft_weights(model_id, device=torch_device, key_mapping=key_mapping, **hub_kwargs)
            result = set_peft_model_state_dict(
                self,
                tensors,
                adapter_name=adapter_name,
                ignore_mismatched_sizes=kwargs.get("ignore_mismatched_sizes", False),
                low_cpu_mem_usage=low_cpu_mem_usage,
                keep_dtype=autocast_adapter_dtype,
            )
        except Exception:
            if added:
                self._roll_back(adapter_name)
            raise
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING[self.peft_config[adapter_name].peft_type]
        missing = [key for key in result.missing_keys if prefix in key and adapter_name in key]
        result.missing_keys.clear()
        result.missing_keys.extend(missing)
        self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self._compare_fingerprints(model_id, hub_kwargs)
        if not is_trainable:
            self.eval()
        return result

    def _check_new_adapter_config(self, peft_config: LoraConfig, is_trainable: bool) -> None:
        """Warn where an adapter whose initialisation changed the base meets others."""
        names = {"pissa": "PiSSA", "corda": "CorDA", "olora": "OLoRA"}
        configs = [peft_config, *self.peft_config.values()]
        for method in _CHANGES_BASE:
            if any(getattr(c, "init_lora_weights", None) == method for c in configs):
                warnings.warn(
                    f"{names[method]} changes the base weights of the model and should thus not be used "
                    "with other "
                    f"adapters. Consider converting the {names[method]} adapter into a normal LoRA "
                    "adapter: see "
                    "`path_initial_model_for_weight_conversion` of save_pretrained.",
                    stacklevel=3,
                )
                return

    def _compare_fingerprints(self, model_id: str | os.PathLike[str], hub_kwargs: dict[str, Any]) -> None:
        """Warn if the adapter was made for a base that is quantised otherwise than this one."""
        folder = Path(model_id) / (hub_kwargs.get("subfolder") or "")
        made_for = Fingerprint.read(folder) if (folder / FINGERPRINT_FILE).is_file() else None
        if made_for is None:
            return
        base = base_fingerprint(self.get_base_model())
        reasons = ["nothing is quantised here"] if base is None else made_for.differences(base)
        if reasons:
            warnings.warn(
                f"the adapter in {folder} belongs to another quantised base: {'; '.join(reasons)}",
                stacklevel=3,
            )

    @classmethod
    def _split_kwargs(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """``kwargs`` as (hf_hub_download's, the rest)."""
        from huggingface_hub import hf_hub_download

        names = {*inspect.signature(hf_hub_download).parameters, "use_auth_token"}
        hub = {key: value for key, value in kwargs.items() if key in names}
        return hub, {key: value for key, value in kwargs.items() if key not in names}


def _load_config(model_id: str | os.PathLike[str], kwargs: dict[str, Any]) -> Any:
    wanted = ("subfolder", "revision", "cache_dir", "token", "use_auth_token", "local_files_only")
    return PeftConfig.from_pretrained(model_id, **{k: kwargs[k] for k in wanted if kwargs.get(k) is not None})


def _not_solved_again(config: Any, model_id: str | os.PathLike[str]) -> Any:
    """A saved adapter whose file says "loftq" has its solution in it: loading must not solve (and change)
    the base."""
    if config.init_lora_weights == "loftq":
        warnings.warn(
            f"{model_id} was saved with init_lora_weights='loftq'; it is loaded as it is and the base is "
            "left alone",
            stacklevel=3,
        )
        config.init_lora_weights, config.loftq_config = True, {}
    return config


def warn_about_name(adapter_name: str, config: PeftConfig) -> None:
    """Warn about a name that is part of the adapters' prefix: keys could not be told apart."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type)  # type: ignore[call-overload]
    if prefix and adapter_name in prefix:
        warnings.warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. "
            "This may lead to reinitialization of the adapter weights during loading.",
            stacklevel=3,
        )


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
    dense
    weight released: at no time do the model and a quantised copy of it exist together.

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
            "with a "
            "different config, make sure to call `.unload()` before.",
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
                "with "
                f"revision {revision}",
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
