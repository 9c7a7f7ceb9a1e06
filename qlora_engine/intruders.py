"""Take intruder dimensions out of an adapter: singular directions of W + D that W does not have.

Source: Shuttleworth et al. 2024, arXiv:2410.21228, "LoRA vs Full Fine-tuning: An Illusion of Equivalence".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .combine import pad_rank, svd_of_product
from .layer_merge import is_transposed, original_weight
from .lora_layer import LoraLayer


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Add an adapter like ``old_adapter_name`` with its intruder dimensions damped, and activate it.

    A leading left singular vector of W + D is an intruder if its absolute cosine with every one of W's is
    below ``threshold_epsilon``. D loses ``1 - mitigation_lambda`` of that component of W + D, then is cut
    to its old rank.

    Args:
        peft_model: A PeftModel with LoRA (not DoRA) layers, dense or quantised.
        old_adapter_name: The source, left as it is.
        new_adapter_name: The result.
        top_k: How many leading directions are looked at.
        threshold_epsilon: Cosine below which a direction is an intruder.
        mitigation_lambda: Share of an intruder that stays.
        logging_sink: Called with a line for each layer; None for silence.

    Raises:
        ValueError: not a LoRA model, no such adapter, a DoRA adapter, or the new name exists.
    """
    log = logging_sink or (lambda line: None)
    config = getattr(peft_model, "peft_config", {}).get(old_adapter_name)
    kind = getattr(peft_model, "peft_type", None) or getattr(config, "peft_type", None)
    if str(getattr(kind, "value", kind)) != "LORA":
        raise ValueError("The provided model is not using LoRA and is therefore not supported.")
    if config is None:
        raise ValueError(f"Adapter {old_adapter_name} does not exist")
    if config.use_dora:
        raise ValueError("DoRA adapters are not supported: their change of the weight is not of low rank")
    layers = {
        name: module
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer) and module.has_adapter(old_adapter_name)
    }
    settings = (top_k, threshold_epsilon, mitigation_lambda)
    results = {name: _mitigated(layer, old_adapter_name, *settings) for name, layer in layers.items()}

    plain = {"init_lora_weights": True, "loftq_config": {}}
    plain |= dict.fromkeys(("eva_config", "corda_config", "lora_ga_config"))
    peft_model.add_adapter(new_adapter_name, replace(config, **plain))
    for name, layer in layers.items():
        found, factors = results[name]
        log(f"{name}: Intruders: {found}" if found else f"{name}: No intruders")
        new, old = (layer.get_factors(n) for n in (new_adapter_name, old_adapter_name))
        for own, source, value in zip(new, old, factors):
            own.data = value.reshape(own.shape).to(source, copy=True)
        if layer.lora_bias.get(old_adapter_name, False):
            layer.lora_B[new_adapter_name].bias.data.copy_(layer.lora_B[old_adapter_name].bias)
    log(f"Enabling new adapter {new_adapter_name}")
    peft_model.set_adapter(new_adapter_name)


def _mitigated(
    layer: LoraLayer, adapter: str, top_k: int, threshold: float, kept: float
) -> tuple[int, tuple[Tensor, Tensor]]:
    """How many intruders there are, and the factors without them (the old ones if there are none)."""
    A, B = layer.get_factors(adapter)
    W = original_weight(layer).float()
    embedding = adapter in layer.lora_embedding_A
    # An embedding is compared as it lies, (rows, width); everything else as (out, in).
    W = W.t() if is_transposed(layer) and not embedding else W.flatten(1)
    scaling = float(layer.scaling[adapter])
    D = scaling * (B.float() @ A.float())  # (out, in)
    D = D.t() if embedding else D
    U_base = torch.linalg.svd(W, full_matrices=False).U
    U, S, Vh = torch.linalg.svd(W + D, full_matrices=False)
    cosine = (U[:, :top_k].t() @ U_base).abs().amax(dim=1)  # (top_k,)
    intruders = torch.nonzero(cosine < threshold).flatten()
    if not len(intruders):
        return 0, (A.detach(), B.detach())
    left, right = U[:, intruders] * S[intruders], Vh[intruders]  # the intruders' part of W + D
    left, right = (right.t(), left.t()) if embedding else (left, right)
    B_all = torch.cat([B.float(), (kept - 1) / scaling * left], dim=1)
    A_all = torch.cat([A.float(), right], dim=0)
    U, S, Vh = svd_of_product(B_all, A_all)
    rank = A.shape[0]
    root = S[:rank].sqrt()  # shared evenly, so that neither factor is much larger than the other
    new_A, new_B = root.unsqueeze(1) * Vh[:rank], U[:, :rank] * root
    return len(intruders), (pad_rank(new_A, rank, dim=0), pad_rank(new_B, rank, dim=1))
