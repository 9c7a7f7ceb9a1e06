"""Mixed batches: every row of a batch through its own adapter, by hooks that hand the names to the layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from .adapters import lora_layers
from .auxiliary import AuxiliaryTrainingWrapper
from .lora_layer import BASE_ONLY, LoraLayer


def _hand_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]) -> Any:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


def _encoder_of(model: Any) -> nn.Module | None:
    """The encoder of an encoder-decoder model; transformers 5 returns the model itself where there is
    none."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    return None if encoder is model else encoder


@contextmanager
def adapter_names_for_rows(model: Any, adapter_names: Any, num_beams: Any) -> Iterator[None]:
    """Within the block, forward calls of ``model`` use ``adapter_names``, one a row of the batch.

    The hooks are gone when the block is left, however it is left.

    Args:
        model: The model that holds the layers (a LoraModel or its inner model).
        adapter_names: Names, ``"__base__"`` for none; None does nothing.
        num_beams: Of a beam search: decoder layers see every row that many times.

    Raises:
        ValueError: the model is training, or an adapter that no layer has.
        TypeError: beam search and ``adapter_names`` is no list.
    """
    if adapter_names is None:
        yield
        return
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    known = {name for layer in lora_layers(model) for name in layer._get_available_adapters()}
    unknown = {name for name in adapter_names if name != BASE_ONLY} - known
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    for_encoder = adapter_names
    beams = isinstance(num_beams, int) and num_beams > 1
    if beams:
        if not isinstance(adapter_names, (list, tuple)):
            raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
        adapter_names = [name for name in adapter_names for _ in range(num_beams)]
    inner = getattr(model, "model", model)
    encoder = _encoder_of(inner) if beams else None
    in_encoder = set(encoder.modules()) if encoder is not None else set()
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)):
                layer: Any = module
                names = for_encoder if layer in in_encoder else adapter_names
                hook = partial(_hand_names, adapter_names=names)
                hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
