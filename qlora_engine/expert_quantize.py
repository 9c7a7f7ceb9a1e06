"""Quantise the stacked experts of a model in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quant import QuantSpec
from quant.experts import QuantExperts
from quant.linear import QuantLinear
from quant.tensor import quantize

from .expert_stack import is_stack, multiplies_in_out, parameter_names, place_of, put_expert, settle_experts
from .quantized_config import record_quantization


@torch.no_grad()
def quantize_experts(model: nn.Module, spec: QuantSpec | str = "nf4", *, scales: str = "absmax") -> list[str]:
    """Quantise every stack of experts in place, one stack after the other, each expert like a Linear.

    ``get_peft_model`` leaves such stacks as they are. Called before it, on a model in full precision, this
    brings a mixture of experts to few bits; ``LoraConfig(target_parameters=...)`` adapts the experts then.

        quantize_experts(model, "nf4")
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))

    Args:
        model: Of transformers, its experts dense and without adapters. It runs them one by one afterwards.
        spec: How, or the name of a format.
        scales: "absmax", "mse" or "signed-mse", see ``quant.quantize``.

    Returns:
        Paths of the stacks that are quantised now.

    Raises:
        ValueError: no stack of experts, an unknown format, a value that is not finite, or weights that are
            not loaded.
    """
    spec = QuantSpec(spec) if isinstance(spec, str) else spec
    done: list[str] = []
    for name, owner in list(model.named_modules()):
        for leaf in parameter_names(owner):
            if is_stack(owner, leaf):
                _quantize_stack(owner, leaf, f"{name}.{leaf}", spec, scales)
                done.append(f"{name}.{leaf}")
    if not done:
        there = any(isinstance(module, QuantExperts) for module in model.modules())
        raise ValueError(
            f"{type(model).__name__} has no dense stacks of experts{': they are quantised' if there else ''}"
        )
    settle_experts(model)
    record_quantization(model)
    return done


def _quantize_stack(owner: nn.Module, leaf: str, path: str, spec: QuantSpec, scales: str) -> None:
    stack: Any = owner._parameters[leaf]
    if stack.is_meta:
        raise ValueError(f"'{path}' is on the meta device; load the model first")
    in_out = multiplies_in_out(owner)

    def matrix(number: int) -> Tensor:
        weight: Tensor = stack.data[number]
        return weight.T.contiguous() if in_out else weight

    # all of them before the first is put in its place: a value that is not finite leaves the stack as it was
    found = [
        quantize(matrix(number), spec, scales=scales, name=f"{path}.{number}") for number in range(len(stack))
    ]
    modules = {"": owner}
    for number, q in enumerate(found):
        place = place_of(modules, f".{leaf}.{number}")
        assert place is not None
        put_expert(place, QuantLinear.from_quantized(q, conv1d=in_out))
