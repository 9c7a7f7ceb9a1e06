"""One attention mask for all layers of a packed batch.

From positions that restart, transformers makes a mask of truth values, of which PyTorch's attention makes a
floating-point one in every layer and keeps it for backward: batch x length^2 x 2 bytes a layer, 4 GiB for 32
layers at 8192 tokens. Made once in the form that attention wants, it is kept once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ALIGNED = 16  # elements; attention kernels copy a mask whose rows are not


def packed_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """What a token may look at: itself and those before it since the last position 0.

    Args:
        positions: int64 (batch, length); a row begins at each 0.
        dtype: Of the attention.

    Returns:
        (batch, 1, length, length) of ``dtype``: 0 or its most negative number, to be added to the scores.
    """
    batch, length = positions.shape
    row = (positions == 0).cumsum(1)
    allowed = (row[:, :, None] == row[:, None, :]).tril_()
    stride = -(-length // _ALIGNED) * _ALIGNED
    mask = torch.full((batch, 1, length, stride), torch.finfo(dtype).min, dtype=dtype, device=row.device)
    mask = mask[..., :length]
    return mask.masked_fill_(allowed[:, None], 0.0)


def mask_bytes(batch: int, length: int, dtype: torch.dtype) -> int:
    """Of ``packed_mask`` for so many rows and tokens."""
    return batch * length * (-(-length // _ALIGNED) * _ALIGNED) * dtype.itemsize


def attention_dtype(model: Any) -> torch.dtype:
    """Of the attention's products, autocast considered."""
    weight: Tensor = model.get_output_embeddings().weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


@torch.no_grad()
def takes_packed_mask(model: Any) -> bool:
    """Whether all layers of a causal language model attend to all earlier tokens, with PyTorch's attention,
    and take the mask as it is: tried on two short rows.

    Args:
        model: A transformers model.
    """
    config = model.config.get_text_config()
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    plain = not windowed and not getattr(config, "attention_chunk_size", None) and kinds == {"full_attention"}
    if not plain or getattr(config, "_attn_implementation", "") != "sdpa":
        return False
    device = model.get_output_embeddings().weight.device
    ids = torch.arange(12, device=device)[None] % config.vocab_size
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None].to(device)
    mask = packed_mask(positions, attention_dtype(model))
    training = model.training
    model.eval()
    try:
        want = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        got = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
        alone = model(input_ids=ids[:, 5:], use_cache=False).logits
    except (TypeError, ValueError, RuntimeError):  # takes no positions, or no such mask
        return False
    finally:
        model.train(training)
    within = 1e-2 * float(want.abs().max())
    return all(torch.allclose(a, b, rtol=1e-2, atol=within) for a, b in ((got, want), (got[:, 5:], alone)))
