"""Plain torch, any device."""

from quant.backends.reference import absmax_scales, dequantize, encode, quantize, unavailable

__all__ = ["absmax_scales", "dequantize", "encode", "quantize", "unavailable"]
