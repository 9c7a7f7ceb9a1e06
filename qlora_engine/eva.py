"""EVA: run data through a model, start A from what its layers are fed (Paischer et al., arXiv:2410.07170).

The arguments are PEFT's. Each batch updates the principal components of every layer's input; layers that are
fed the same tensor share theirs. Layers get ranks by how much of their inputs' variance a direction explains.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from quant.linear import QuantLinear

from .base_weight import is_bnb_linear, is_conv1d
from .calibration_result import Calibration
from .config import LoraConfig
from .eva_load import load_eva_state_dict
from .eva_pass import EvaPass, Prepare, eva_config, first_tensor
from .inits import get
from .inits.method import InitRequest
from .lora import Linear
from .targets import check_target_module_exists


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """``model(**inputs)``."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """Which tokens count: (n, 2), the row and column of each token that is neither padding nor masked.

    Raises:
        TypeError: ``model_input`` is no mapping.
    """
    if not isinstance(model_input, Mapping):
        raise TypeError("When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary")
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]) if mask is None else mask
    mask = mask.bool()
    settings = eva_config(peft_config)
    if settings.use_label_mask and model_input.get("labels") is not None:
        mask = mask & (model_input["labels"] != settings.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Any, model_input: Tensor, layer_name: str
) -> Tensor:
    """Rows (n, in) of the tokens that count; all rows of an input that has no dimension of tokens."""
    x = first_tensor(layer_input, layer_name)
    return x if x.dim() == 2 else x[model_input[:, 0], model_input[:, 1]]


def _targets(model: Any, config: LoraConfig) -> dict[str, nn.Module]:
    """Linear layers to initialise: the adapted ones of a PeftModel, else those that the config names."""
    if hasattr(model, "peft_config"):
        return {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, (nn.Linear, QuantLinear)) or is_conv1d(module) or is_bnb_linear(module))
        and (config.target_modules is None or check_target_module_exists(config, name))
    }


def _to_device(inputs: Any, device: torch.device | None) -> Any:
    if device is None:
        return inputs
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: _to_device(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_to_device(value, device) for value in inputs)
    return inputs


def _device(model: nn.Module) -> torch.device | None:
    """The one device of the parameters that are not on the meta device; None if there are several."""
    devices = {p.device for p in model.parameters() if not p.is_meta}
    return devices.pop() if len(devices) == 1 else None


def _from_calibration(calibration: Calibration, run: EvaPass) -> dict[str, Tensor]:
    """A of every layer from its second moment and mean input; every layer keeps its rank."""
    found = {}
    solve = get("eva").solve
    for name, rank in run.usual.items():
        plain = name.removeprefix("base_model.model.")
        layer = calibration.layers.get(calibration.names.get(plain, plain))
        if layer is None or layer.kind != "full":
            continue
        moment = calibration[plain]
        request = InitRequest(
            rank=rank,
            hessian=moment,
            mean=calibration.mean_input(plain),
            tokens=layer.tokens,
            whiten=run.settings.whiten,
            svd="exact",
            name=plain,
        )
        found[name] = solve(moment.new_zeros(rank, len(moment)), request).factors.A
    return found


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any] | Calibration,
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[Any, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Prepare
    | Mapping[str, Prepare]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """A by layer from the data: one pass at most, ended early when no layer's components move any more.

    Args:
        model: A PeftModel, whose adapted linear layers are meant, or any model.
        dataloader: Batches for ``forward_fn``; or a ``Calibration`` of the base model, whose second moments
            give the same components without another pass (ranks are not redistributed then).
        peft_config: Needed where ``model`` is no PeftModel; ``r``, ``rank_pattern`` and ``eva_config`` count.
        forward_fn: (model, batch) -> anything. Default: ``model(**batch)``.
        prepare_model_inputs_fn: (batch, config) -> what the next function gets of the batch. Default: which
            tokens are neither padding nor masked by a label. None: the batch itself.
        prepare_layer_inputs_fn: (positional inputs of a layer, what the last function gave, the layer's
            name) -> rows (n, in); or such a function by name. None: all rows.
        adapter_name: Whose config counts in a PeftModel.
        gather_distributed_inputs: With torch.distributed initialised, use the rows of all processes.
        show_progress_bar: Show the batches.

    Returns:
        Layer name -> (rank, in) float32; ranks add up to the sum of the configured ones, none is larger than
        ``rho`` times its own, and some may be 0.

    Raises:
        ValueError: no config, no data, fewer tokens than a rank, or a name that is no layer.
    """
    adapted = hasattr(model, "peft_config")
    if peft_config is None:
        if not adapted:
            raise ValueError("peft_config is required if model is not a PeftModel")
        configs: Any = model.peft_config
        peft_config = configs[adapter_name]
    assert peft_config is not None
    targets = _targets(model, peft_config)
    run = EvaPass(model, peft_config, targets, prepare_layer_inputs_fn, gather_distributed_inputs)
    if isinstance(dataloader, Calibration):
        return _from_calibration(dataloader, run)
    if isinstance(dataloader, Sized) and len(dataloader) == 0:
        raise ValueError("dataloader is empty")
    device, training = _device(model), model.training
    off: Any = model.disable_adapter() if adapted else nullcontext()  # type: ignore[operator]
    main = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    model.eval()
    try:
        with off:
            bar = tqdm(dataloader, disable=not (show_progress_bar and main), leave=False, desc="EVA")
            for batch in bar:
                batch = _to_device(batch, device)
                if not run.groups:
                    run.first(lambda batch=batch: forward_fn(model, batch))  # type: ignore[misc]
                run.about = (
                    copy.deepcopy(batch)
                    if prepare_model_inputs_fn is None
                    else prepare_model_inputs_fn(batch, peft_config)
                )
                with ExitStack() as stack:
                    for group in run.active():
                        stack.callback(run.watch(group).remove)
                    forward_fn(model, batch)
                run.share_out()
                left = len(run.active())
                bar.set_postfix_str(f"{len(run.groups) - left}/{len(run.groups)} inputs have converged")
                if not left:
                    break
    finally:
        model.train(training)
    return run.result()


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Any] | Calibration | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[Any, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Prepare
    | Mapping[str, Prepare]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Set A of an adapter made with ``init_lora_weights="eva"``, and the ranks that the data asks for.

    Arguments as in ``get_eva_state_dict``, whose result may be given as ``eva_state_dict`` instead of data.
    The config's ``rank_pattern``, ``alpha_pattern`` and ``target_modules`` are brought up to date: a layer of
    rank 0 loses its adapter.

    Raises:
        ValueError: not a PeftModel, several active adapters, another initialisation, or neither data nor a
            state dict.
    """
    if not hasattr(model, "peft_config"):
        raise ValueError("model must be a PeftModel")
    if len(model.active_adapters) > 1:
        raise ValueError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    config = model.peft_config[adapter_name]
    if config.init_lora_weights != "eva":
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model=model,
            dataloader=dataloader,
            forward_fn=forward_fn,
            prepare_model_inputs_fn=prepare_model_inputs_fn,
            prepare_layer_inputs_fn=prepare_layer_inputs_fn,
            adapter_name=adapter_name,
            gather_distributed_inputs=gather_distributed_inputs,
            show_progress_bar=show_progress_bar,
        )
    load_eva_state_dict(model, eva_state_dict, adapter_name, eva_config(config).adjust_scaling_factors)
