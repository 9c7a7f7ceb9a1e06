"""The quantisation layer: formats, block scales, packed tensors and the backends that compute them.

Knows torch only. Importing it loads neither triton, bitsandbytes nor transformers.
"""

from quant.spec import QuantSpec
from quant.tensor import QuantizedTensor, encode, from_codes, quantize

__all__ = ["QuantSpec", "QuantizedTensor", "encode", "from_codes", "quantize"]
