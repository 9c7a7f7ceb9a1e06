"""The quantisation layer: formats, block scales, packed tensors and the backends that compute them.

    q = quantize(weight, QuantSpec("nf4", block_size=64, double_quant=True), scales="signed-mse")
    q.bits_per_weight, q.nbytes         # about 4.13, and bytes of codes and scales
    dense = q.dequantize(torch.bfloat16)

Formats are quant.formats.names(); quant.linear has the frozen layers QuantLinear and QuantEmbedding,
quant.bnb_format reads and writes bitsandbytes' files without it, quant.backends chooses who computes.

Knows torch only. Importing it loads neither triton, bitsandbytes nor transformers.
"""

from quant.spec import QuantSpec
from quant.tensor import QuantizedTensor, encode, from_codes, quantize

__all__ = ["QuantSpec", "QuantizedTensor", "encode", "from_codes", "quantize"]
