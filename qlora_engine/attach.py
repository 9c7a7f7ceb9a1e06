"""LoraModel: puts adapters on the modules of a model and takes them off again."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import adapters
from .adapter_state import keys_in_memory
from .auxiliary import AuxiliaryTrainingWrapper
from .base_weight import restore_adopted
from .calibrated_model import calibrated
from .compute import set_compute
from .config import LoraConfig, PeftConfig, PeftType
from .extra_modules import add_extra_trainable_modules
from .lora import create_lora_layer
from .lora_init import check_loftq
from .lora_layer import LoraLayer
from .mixed_batch import adapter_names_for_rows
from .quantized_config import record_quantization, tied_embeddings, untie_if_quantized
from .target_plan import check_plan, choose_targets, expand_all_linear, model_config_dict, plan_modules
from .targets import (
    DUMMY_TARGET_MODULES,
    check_target_module_exists,
    condense,
    pattern_value,
    warn_unmatched_patterns,
    why_not_adapted,
)
from .tuner_layer import BaseTunerLayer, as_names
from .tying import is_tied_target, module_names_tied_with_embedding, plan_ties


class LoraModel(nn.Module):
    """A model whose chosen modules are adapted in place.

    Args:
        model: Any module; transformers' conventions are used where they are found.
        peft_config: A LoraConfig, or several by adapter name.
        adapter_name: The adapter to add now.
        low_cpu_mem_usage: Make the adapter's weights on the meta device.
        state_dict: Choose the modules by the keys of this state dict instead of by the config.

    Attributes:
        model: The adapted model.
        peft_config: Configs by adapter name; the same dict is ``model.peft_config``.
        targeted_module_names, targeted_parameter_names: What was adapted.
    """

    prefix: str = "lora_"
    uses_shared_state: bool = False  # nothing is shared between layers
    tuner_layer_cls = LoraLayer

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, Any],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        configs: dict[str, Any] = (
            peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        )
        existing = getattr(model, "peft_config", None)
        if isinstance(existing, dict):
            warnings.warn(
                "Already found a `peft_config` attribute in the model. This will lead to having multiple "
                "adapters"
                " in the model. Make sure to know what you are doing!",
                stacklevel=3,
            )
            existing.update(configs)
            configs = existing
        self.peft_config = configs
        self.active_adapter: str | list[str] = adapter_name
        self.inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
        self.model.peft_config = self.peft_config  # type: ignore[assignment]

    # ---- adapters

    @property
    def active_adapters(self) -> list[str]:
        """The active names as a list."""
        return as_names(self.active_adapter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's forward."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not initialised yet: nothing to ask
                raise
            return getattr(self.model, name)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """``model.config`` as a dict."""
        return model_config_dict(model)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter or several; see ``adapters.set_adapter``."""
        adapters.set_adapter(self.model, adapter_name, inference_mode, self.tuner_layer_cls)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the weights of these adapters train, or not."""
        adapters.set_requires_grad(self.model, adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was the only active one, the next becomes active everywhere.

        Raises:
            ValueError: no such adapter, or it is merged.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        adapters.check_not_merged(self.model, adapter_name)
        del self.peft_config[adapter_name]
        was_active = adapter_name in self.active_adapters
        active = [name for name in self.active_adapters if name != adapter_name]
        adapters.delete_adapter(self.model, adapter_name, self.prefix, self.tuner_layer_cls)
        if was_active and not active and self.peft_config:
            # Layers that do not have the same adapters would each choose another one.
            active = [min(self.peft_config)]
            self.set_adapter(active)
        self.active_adapter = active[0] if len(active) == 1 else active

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        """PEFT's name of ``tying.module_names_tied_with_embedding``."""
        return module_names_tied_with_embedding(self.model)

    def _set_enabled(self, enabled: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                module.enable_adapters(enabled)

    def disable_adapter_layers(self) -> None:
        """Make every forward that of the base model; warns where trained biases stay."""
        for name in self.active_adapters:
            bias = getattr(self.peft_config[name], "bias", "none")
            if bias != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does not "
                    "produce the same output as the base model would without adaption.",
                    stacklevel=2,
                )
        self._set_enabled(False)

    def enable_adapter_layers(self) -> None:
        """Undo ``disable_adapter_layers``."""
        self._set_enabled(True)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        adapters.cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        with adapter_names_for_rows(self, names, kwargs.get("num_beams")):
            yield

    # ---- putting adapters on

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Adapt the modules that ``self.peft_config[adapter_name]`` chooses, one after another.

        A module that is quantised on the way is released before the next one is looked at, so that the
        peak is one dense layer above what stays.

        Args:
            model: To change in place.
            adapter_name: Whose config to follow.
            autocast_adapter_dtype: Unused here, as in PEFT: the caller casts.
            low_cpu_mem_usage: Make the adapter's weights on the meta device.
            state_dict: Its keys choose the modules instead of the config.

        Raises:
            NoMatchingPeftModuleError: the config chooses nothing.
            ValueError: it conflicts with the adapters that are there, or a layer refuses it.
        """
        config = self.peft_config[adapter_name]
        choose_targets(config, model)
        self._check_new_adapter_config(config)
        plan_ties(model, config)
        expand_all_linear(config, model)
        if config.target_parameters and state_dict:
            raise ValueError(
                "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses "
                "`target_parameters`. This is not supported -- when using `target_parameters`, please "
                "inject the adapter without the state_dict."
            )
        # Names only: a list of modules would keep every dense layer alive until the end.
        names = [name for name, _ in model.named_modules()]
        inside = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))
        before = _trainability(model, adapter_name) if inside else []
        dummy = config.target_modules == DUMMY_TARGET_MODULES
        candidates = [n for n in names if n and not n.startswith(inside)] if not dummy else []
        config.target_modules = condense(config.target_modules, names)
        plan, tied = plan_modules(
            config, candidates, state_dict, self.prefix, matches=self._check_target_module_exists
        )
        was_tied = tied_embeddings(model)
        make: Callable[[], AbstractContextManager[Any]] = _on_meta if low_cpu_mem_usage else nullcontext
        with ExitStack() as stack:
            if config.init_lora_weights == "loftq" and not low_cpu_mem_usage:
                self._check_loftq(config, model, plan.targeted)
                stack.enter_context(calibrated(model, config, plan.targeted))
            for key in plan.targeted:
                with make():
                    self._adapt(config, adapter_name, model, key)
        parameters: list[str] = []
        if config.target_parameters:
            from .lora_param import inject_parameters

            parameters = inject_parameters(self, config, adapter_name, model, make)
        for key in tied:
            with make():
                self._adapt(config, adapter_name, model, key)
            plan.targeted.append(key)
        untie_if_quantized(model, was_tied)
        record_quantization(model)
        if config.runtime_config.compute is not None:
            set_compute(model, config.runtime_config.compute)
        check_plan(config, plan, parameters, dummy)
        warn_unmatched_patterns(config, [*plan.targeted, *parameters])
        self._note_targets(plan.targeted, parameters)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)
        add_extra_trainable_modules(
            model, config, self.get_model_config(self), adapter_name, adapter_name in self.active_adapters
        )
        for reference, requires_grad in before:
            parameter = reference()
            if parameter is not None:
                parameter.requires_grad = requires_grad

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        others = [other for other in self.peft_config.values() if other is not config]
        if others and sum(getattr(c, "bias", "none") != "none" for c in (config, *others)) > 1:
            raise ValueError(
                f"{type(self).__name__} supports only 1 adapter with bias. When using multiple adapters, "
                "set bias to 'none' for all adapters."
            )
        wanted = set(config.target_parameters or ())
        for name, other in self.peft_config.items():
            theirs = set(getattr(other, "target_parameters", None) or ())
            if other is not config and wanted and theirs and wanted != theirs:
                raise ValueError(
                    "When using multiple adapters with `target_parameters`, all adapters must target the "
                    f"same set of parameters, but got {sorted(wanted)} for the new adapter and "
                    f"{sorted(theirs)} for adapter '{name}'."
                )

    def _check_target_module_exists(self, config: LoraConfig, key: str) -> Any:
        return check_target_module_exists(config, key)

    def _check_loftq(self, config: LoraConfig, model: nn.Module, keys: list[str]) -> None:
        """Refuse before the first layer is quantised: what is quantised cannot be put back."""
        for key in keys:
            layer: Any = model.get_submodule(key)
            if isinstance(layer, LoraLayer):
                if layer.merged:
                    raise ValueError(
                        f"'{key}' has merged adapters; unmerge them before its weight is quantised"
                    )
                warnings.warn(
                    f"quantising '{key}' changes the weight below its adapters "
                    f"{sorted(layer._get_available_adapters())}",
                    stacklevel=6,
                )
            base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
            rank = pattern_value(config.rank_pattern, key, config.r, field_name="rank_pattern")
            check_loftq(base, rank, config, key)

    def _note_targets(self, modules: list[str], parameters: list[str]) -> None:
        for noted, new in (
            (self.targeted_module_names, modules),
            (self.targeted_parameter_names, parameters),
        ):
            seen = set(noted)
            noted.extend(name for name in dict.fromkeys(new) if name not in seen)

    def _adapt(self, config: LoraConfig, adapter_name: str, model: nn.Module, key: str) -> None:
        parent_name, _, name = key.rpartition(".")
        parent, target = model.get_submodule(parent_name), model.get_submodule(key)
        if reason := why_not_adapted(self.get_model_config(model).get("model_type"), name):
            raise ValueError(reason)
        self._create_and_replace(config, adapter_name, target, name, parent, key)

    def _create_and_replace(
        self,
        config: LoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        """Add the adapter to ``target`` if it is adapted already, else put an adapted layer in its place."""
        r = pattern_value(config.rank_pattern, current_key, config.r, field_name="rank_pattern")
        alpha = pattern_value(
            config.alpha_pattern, current_key, config.lora_alpha, field_name="alpha_pattern"
        )
        kwargs: dict[str, Any] = {"target_name": current_key}
        if is_tied_target(config, target_name) or is_tied_target(config, current_key):
            source = self.model.get_input_embeddings()  # type: ignore[operator]
            kwargs["tied_adapter"] = {
                "lora_A": source.lora_embedding_B[adapter_name].t(),
                "lora_B": source.lora_embedding_A[adapter_name].t(),
            }
        nested = (
            parameter_name is not None and isinstance(target, LoraLayer) and target.has_adapter(adapter_name)
        )
        if isinstance(target, LoraLayer) and not nested:
            target.update_layer(adapter_name, r, lora_alpha=alpha, config=config, **kwargs)
            return
        kwargs["ephemeral_gpu_offload"] = config.runtime_config.ephemeral_gpu_offload
        new = create_lora_layer(
            target, adapter_name, config, r=r, lora_alpha=alpha, parameter_name=parameter_name, **kwargs
        )
        if adapter_name not in self.active_adapters:
            for container in getattr(new, "_containers", tuple)():
                container.requires_grad_(False)
        new.train(target.training)
        setattr(parent, target_name, new)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        biases = [getattr(self.peft_config[name], "bias", "none") for name in self.active_adapters]
        adapters.mark_only_adapters_as_trainable(model, biases)

    # ---- merging and taking adapters off; the arithmetic is in ``merging``

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters (default: the active ones) into the base weights in place; see
        ``unmerge_adapter``."""
        from .merging import merge_adapter

        merge_adapter(self, adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Put every base weight back as it was before merging, bit for bit."""
        for layer in list(adapters.tuner_layers(self.model)):
            layer.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        **options: Any,
    ) -> nn.Module:
        """Merge adapters and return the model without adapter layers; see ``merging.merge_and_unload``."""
        from .merging import merge_and_unload

        result = merge_and_unload(
            self, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names, **options
        )
        record_quantization(self.model)
        return result

    def unload(self) -> nn.Module:
        """The base model again, every adapter layer taken off."""
        from .merging import unload

        model = unload(self)
        restore_adopted(model)
        record_quantization(model)
        return model

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter that combines others; see ``mixing.add_weighted_adapter``."""
        from .mixing import add_weighted_adapter

        add_weighted_adapter(self, *args, **kwargs)


BaseTuner = LoraModel
PEFT_TYPE_TO_TUNER_MAPPING: dict[str, type[LoraModel]] = {PeftType.LORA: LoraModel}


def _trainability(model: nn.Module, adapter_name: str) -> list[tuple[Any, bool]]:
    """(weak reference, requires_grad) of what exists, less what is already there of ``adapter_name``."""
    known = keys_in_memory(model, adapter_name)
    return [
        (weakref.ref(parameter), parameter.requires_grad)
        for name, parameter in model.named_parameters()
        if name not in known
    ]


@contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Adapt ``model`` in place and return it, without a PeftModel around it.

    Args:
        peft_config: What to adapt and how.
        model: To change.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Make the adapter's weights on the meta device.
        state_dict: Its keys choose the modules; its values are not used.
    """
    tuner = LoraModel(
        model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
    )
    return tuner.model


def inspect_matched_modules(tuner: LoraModel, adapter_name: str = "default") -> dict[str, list[str]]:
    """Names of the modules that the adapter's config matches ("matched") and does not ("unmatched")."""
    config = tuner.peft_config[adapter_name]
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for key, _ in tuner.model.named_modules():
        found["matched" if check_target_module_exists(config, key) else "unmatched"].append(key)
    return found
