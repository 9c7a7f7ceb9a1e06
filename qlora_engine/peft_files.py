"""AdapterFiles: how a PeftModel's adapters are saved and loaded."""

from __future__ import annotations

import inspect
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .adapter_save import save_adapters, write_model_card
from .adapter_state import load_peft_weights, set_peft_model_state_dict
from .base_match import differences
from .config import PEFT_TYPE_TO_PREFIX_MAPPING, LoraConfig, PeftConfig
from .fingerprint import FINGERPRINT_FILE, Fingerprint
from .peft_layout import check_stacks, release_of_stacks

if TYPE_CHECKING:
    from .peft_model import PeftModel

_CHANGES_BASE = ("pissa", "corda", "olora")


class AdapterKeysWarning(UserWarning):
    """An adapter file lacks tensors that its config asks for, or holds some without a place in the model."""


class AdapterFiles:
    """The part of PeftModel that reads and writes adapter folders."""

    if TYPE_CHECKING:  # what PeftModel brings

        def __getattr__(self, name: str) -> Any: ...

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
            ValueError: ``config`` is no PeftConfig, the files are missing, or an older PEFT ordered the
                factors of experts otherwise.
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
        from .peft_tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

        release = release_of_stacks(loaded)
        target: Any = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(loaded.task_type, cls)
        peft_model: PeftModel = target(
            model,
            _not_solved_again(loaded, model_id),
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
        check_stacks(peft_model, adapter_name, release)
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
            warnings.warn(message, AdapterKeysWarning, stacklevel=2)
        if result.unexpected_keys:
            warnings.warn(
                f"Found adapter keys that have no place in this model: {result.unexpected_keys}.",
                AdapterKeysWarning,
                stacklevel=2,
            )
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
            ValueError: the files are missing, the config does not fit, or an older PEFT ordered the
                factors of experts otherwise.
            RuntimeError: a tensor of another shape.
        """
        hub_kwargs, kwargs = self._split_kwargs(kwargs)
        added = adapter_name not in self.peft_config
        if added:
            config = _load_config(model_id, hub_kwargs)
            release = release_of_stacks(config)
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
            if added:
                check_stacks(self, adapter_name, release)
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
                    f"with other adapters. Consider converting the {names[method]} adapter into a normal "
                    "LoRA adapter: see `path_initial_model_for_weight_conversion` of save_pretrained.",
                    stacklevel=3,
                )
                return

    def _compare_fingerprints(self, model_id: str | os.PathLike[str], hub_kwargs: dict[str, Any]) -> None:
        """Warn if the adapter was made for a base that is quantised otherwise than this one."""
        folder = Path(model_id) / (hub_kwargs.get("subfolder") or "")
        made_for = Fingerprint.read(folder) if (folder / FINGERPRINT_FILE).is_file() else None
        if made_for is None:
            return
        reasons = differences(made_for, self.get_base_model())
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
