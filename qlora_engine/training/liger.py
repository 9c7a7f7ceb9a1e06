"""liger-kernel's fused linear cross entropy (Hsu et al. 2024, arXiv:2410.10989) in place of ours, on GPUs.

Its kernel makes a chunk's logits into their gradient where they lie. Liger's own chunks are as large as the
hidden states, 64 rows at 2048 tokens of Llama 3: each reads the head's whole weight, so it is asked for
larger ones.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor

from .data import IGNORED

_CHUNKS = "chunk_mem_const"  # liger-kernel's argument: its chunks are so many times larger


def why_not(weight: Tensor, bias: Tensor | None, softcap: float | None) -> str:
    """Why liger-kernel cannot compute the loss of this head, in a few words; "" where it can.

    Args:
        weight: The head's, (vocabulary, hidden_size).
        bias: The head's, None: without.
        softcap: The bound of the logits, None: without.
    """
    if bias is not None:
        return "the head has a bias, whose gradient liger-kernel would compute in vain"
    if softcap is not None:
        return "the logits are capped"
    if weight.device.type != "cuda":
        return f"liger-kernel needs a GPU, the model is on {weight.device.type}"
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"liger-kernel does not know {weight.dtype}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install liger-kernel)"
    try:
        function = _function()
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"liger-kernel cannot be imported: {error}"
    if _CHUNKS not in inspect.signature(function).parameters:
        return "this liger-kernel is older than 0.8.5, which takes the size of its chunks"
    return ""


def _function() -> Any:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, most_rows: int) -> Tensor:
    """Sum of the negative log-likelihoods of ``targets`` under ``softmax(hidden @ weight^T)``.

    Args:
        hidden: (rows, hidden_size). Only it gets a gradient.
        weight: (vocabulary, hidden_size), frozen.
        targets: int64 (rows,); rows with -100 are left out before anything is computed.
        most_rows: Of a chunk, a power of two.

    Returns:
        float32 scalar.
    """
    labelled = (targets != IGNORED).nonzero().squeeze(1)
    rows: Tensor = _Rows.apply(hidden, labelled)
    if not labelled.numel():
        return rows.float().sum()  # zero, and so are its gradients
    vocabulary, width = weight.shape
    head, found = weight.to(rows.dtype), targets[labelled]
    total = torch.zeros((), dtype=torch.float32, device=rows.device)
    at_once = _at_once(vocabulary, width, most_rows)
    with torch.autocast(hidden.device.type, enabled=False):
        for part, wanted in zip(rows.split(at_once), found.split(at_once), strict=True):
            size = {_CHUNKS: _factor(part.shape[0], vocabulary, width, most_rows)}
            total = total + _function()(part, head, wanted, reduction="sum", **size)
    return total


class _Rows(torch.autograd.Function):
    """``hidden[labelled]``; the indices differ, so that its gradient needs no sorting and adding up."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labelled: Tensor) -> Tensor:
        ctx.save_for_backward(labelled)
        ctx.shape = hidden.shape
        return hidden.index_select(0, labelled)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (labelled,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).index_copy_(0, labelled, grads[0]), None


def chunk_rows(rows: int, vocabulary: int, hidden: int, most_rows: int) -> int:
    """Rows whose logits exist at once in ``cross_entropy``."""
    rows = min(rows, _at_once(vocabulary, hidden, most_rows))
    return _rows(rows, vocabulary, hidden, _factor(rows, vocabulary, hidden, most_rows))


def _at_once(vocabulary: int, hidden: int, most_rows: int) -> int:
    """Rows of which liger-kernel's smallest chunk still is no larger than allowed: 31,744 of Llama 3."""
    return most_rows * max(1, vocabulary // hidden)


def _factor(rows: int, vocabulary: int, hidden: int, most_rows: int) -> int:
    """How many times larger than its smallest liger-kernel's chunks may be."""
    factor = -(-vocabulary // hidden)  # all rows at once
    while factor > 1 and _rows(rows, vocabulary, hidden, factor) > most_rows:
        factor -= 1
    return factor


def _rows(rows: int, vocabulary: int, hidden: int, factor: int) -> int:
    """Liger-kernel's rule: a power of two, at most ``rows``."""
    parts = -(-vocabulary // (factor * hidden))
    each = -(-rows // parts)
    return min(1 << (each - 1).bit_length(), rows)
