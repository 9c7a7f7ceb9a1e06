"""Rows that share a sequence kept apart in attention: by where they begin, or by one mask for all layers.

From positions that restart, transformers makes a mask of truth values, of which PyTorch's attention makes a
floating-point one in every layer and keeps it for backward: batch x length^2 x 2 bytes a layer, 4 GiB for 32
layers at 8192 tokens; and kernels that take a mask compute what it hides. Where flash attention runs, it is
told where rows begin and needs no mask. Elsewhere the mask is made once, in the form that attention wants.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

BY_BEGINNINGS = "packed_rows"  # the name of ``attend`` among transformers' attentions
_ALIGNED = 16  # elements; attention kernels copy a mask whose rows are not
_CAPABILITY = (8, 0)  # of a GPU, for flash attention
# Of the difference that a row before makes to a row's logits: what rounding may leave of it. SmolLM2 packed
# in float32, float16, bfloat16: 0, .01, .02; with rows that see each other 1.1 to 1.3.
_APART = 0.2


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


def row_beginnings(positions: Tensor, room: int | None = None) -> Tensor:
    """Where rows begin in a batch whose sequences are laid end to end, as ``attend`` takes it.

    Args:
        positions: int64 (batch, length) on the CPU; a row begins at each 0.
        room: For how many rows, so that all batches have one shape; None: as many as there are.

    Returns:
        int32 (1, 1, 1, room + 1): the beginnings, then batch x length. Four dimensions let transformers hand
        it on as it would a mask.
    """
    begins = (positions.flatten() == 0).nonzero().flatten()
    found = torch.full((1 + max(room or 0, len(begins)),), positions.numel(), dtype=torch.int32)
    found[: len(begins)] = begins
    return found.view(1, 1, 1, -1)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa", and causal attention within rows where ``row_beginnings`` stand for the mask.

    Args:
        module: The layer's attention.
        query: (batch, heads, length, head size), float16 or bfloat16 with beginnings.
        key: (batch, key heads, length, head size).
        value: As ``key``.
        attention_mask: ``row_beginnings``, or what "sdpa" takes.
        dropout: Of the scores; there is none with beginnings.
        scaling: Of the scores; None: one over the head size's root.
        kwargs: For "sdpa".

    Returns:
        (batch, length, heads, head size), and no scores.

    Raises:
        ValueError: dropout with beginnings.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    if dropout > 0:
        raise ValueError(f"dropout={dropout} of the scores; attention by rows' beginnings has none")
    batch, heads, length, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    q, k, v = (tensor.to(value.dtype).transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    out = causal_rows(q, k, v, attention_mask.flatten(), length, scale)
    return out.view(batch, length, heads, size), None


def causal_rows(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, longest: int, scale: float) -> Tensor:
    """Flash attention within rows: (tokens, heads, head size) of each, int32 (rows + 1,) -> as ``q``."""
    attention, takes = _varlen()
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    if "enable_gqa" in takes:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    if "scale" in takes:
        options["scale"] = scale
    elif scale != (usual := q.shape[-1] ** -0.5):
        q = q * (scale / usual)
    out: Tensor = attention(q, k, v, begins, begins, longest, longest, **options)
    return out


@cache
def _varlen() -> tuple[Callable[..., Any], frozenset[str]]:
    """torch's attention over rows of different lengths, and the names of what it takes.

    Raises:
        ImportError: torch before 2.10.
    """
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def flash_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``causal_rows`` can run there, as far as is known without trying."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    try:
        _varlen()
    except ImportError:
        return False
    return torch.cuda.get_device_capability(device) >= _CAPABILITY


def attends_by_beginnings(model: Any) -> bool:
    """Whether ``attend_by_beginnings`` has been at the model."""
    return getattr(model.config.get_text_config(), "_attn_implementation", "") == BY_BEGINNINGS


def attend_by_beginnings(model: Any) -> bool:
    """Let the layers of a causal language model take ``row_beginnings`` for a mask, if they can.

    Without beginnings the model computes what it did. Tried on two short rows, as in training too.

    Args:
        model: A transformers model, on its device.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    weight: Tensor = model.get_output_embeddings().weight
    config = model.config.get_text_config()
    if attends_by_beginnings(model):
        return True
    if not _attends_to_all_before(config) or not flash_runs(weight.device, weight.dtype):
        return False
    AttentionInterface.register(BY_BEGINNINGS, attend)
    AttentionMaskInterface.register(BY_BEGINNINGS, sdpa_mask)
    before = config._attn_implementation

    def begin(positions: Tensor) -> Tensor:
        config._attn_implementation = BY_BEGINNINGS
        return row_beginnings(positions.cpu()).to(positions.device)

    if not _takes_for_mask(model, begin, trains=True):
        config._attn_implementation = before
        return False
    return True


def takes_packed_mask(model: Any) -> bool:
    """Whether all layers of a causal language model attend to all earlier tokens, with PyTorch's attention,
    and take the mask as it is: tried on two short rows.

    Args:
        model: A transformers model.
    """
    if not _attends_to_all_before(model.config.get_text_config()):
        return False
    return _takes_for_mask(model, lambda positions: packed_mask(positions, attention_dtype(model)))


def _attends_to_all_before(config: Any) -> bool:
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    plain = not windowed and not getattr(config, "attention_chunk_size", None) and kinds == {"full_attention"}
    return plain and getattr(config, "_attn_implementation", "") in ("sdpa", BY_BEGINNINGS)


@torch.no_grad()
def _takes_for_mask(model: Any, make: Callable[[Tensor], Tensor], *, trains: bool = False) -> bool:
    """Whether two rows are as apart with what is made of their positions as without, and as alone."""
    config = model.config.get_text_config()
    device = model.get_output_embeddings().weight.device
    ids = torch.arange(12, device=device)[None] % config.vocab_size
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None].to(device)
    training = model.training
    model.eval()
    try:
        want = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = model(input_ids=ids[:, 5:], use_cache=False).logits
        mixed = model(input_ids=ids, use_cache=False).logits
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": make(positions)}
        got = model(**inputs, use_cache=False).logits
        if trains:
            model.train()
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                model(**inputs, use_cache=False)
    except (TypeError, ValueError, RuntimeError):  # takes no positions, or no such mask
        return False
    finally:
        model.train(training)
    return apart(got, want, mixed) and apart(got[:, 5:], alone, mixed[:, 5:])


def apart(got: Tensor, alone: Tensor, mixed: Tensor) -> bool:
    """Whether logits are those of rows that are kept apart, up to rounding.

    Args:
        got: Logits (rows, tokens, vocabulary).
        alone: What they should be.
        mixed: What they would be if rows saw each other.
    """
    left, whole = (got.float() - alone.float()).norm(), (mixed.float() - alone.float()).norm()
    return bool(left <= _APART * whole)
