"""In what the products with frozen quantised weights are computed: the input's dtype, or float8."""

from __future__ import annotations

from torch import nn

from quant import fp8
from quant.linear import QuantLinear

from .errors import InputError


def set_compute(model: nn.Module, compute: str) -> int:
    """Compute the products with every quantised Linear of ``model`` otherwise, forward and for dX.

    Args:
        model: Any model with our quantised layers; adapters and all else stay as they are.
        compute: ``"same"``: in the input's dtype. ``"fp8"``: in float8_e4m3fn with a scale for each row of
            the weight and each token (``quant.fp8``), for Ada, Hopper and newer GPUs. It trades accuracy for
            speed; benchmarks/NOTES.md says what it did to a model's loss.

    Returns:
        How many layers were set.

    Raises:
        InputError: another name; "fp8" for a model without quantised Linears, or with one that can't: its
            device has no float8 products, or a dimension is no multiple of 16. Nothing is changed then. A
            model that is moved later is checked when it runs.
    """
    if compute not in fp8.COMPUTES:
        raise InputError(f"compute={compute!r}; allowed: {', '.join(fp8.COMPUTES)}")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    if compute == "fp8" and not layers:
        raise InputError("compute='fp8' is for quantised Linears, and the model has none")
    for name, layer in layers if compute == "fp8" else ():
        try:
            if layer.codes.device.type != "meta":
                fp8.check(layer.codes.device, layer.shape, name)
        except (RuntimeError, ValueError) as error:
            raise InputError(str(error)) from error
    for _, layer in layers:
        layer.compute = compute
    return len(layers)
