"""Cross entropy of a causal language model without its full logits.

Logits of a large vocabulary are the largest tensor of a training step: tokens x vocabulary x 4 bytes,
several times. Here they exist for a chunk of rows at a time, only of rows that have a label, and the
gradient of the hidden states is computed together with the loss, since the head is frozen. On GPUs one kernel
makes a chunk's logits their gradient: liger-kernel's where it is installed (``liger.py``), else ours.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_engine import fused
from qlora_engine.errors import InputError

from . import liger
from .data import IGNORED
from .packed_rows import attend_by_beginnings, attention_dtype, packed_mask, takes_packed_mask

CHUNK_ROWS = 1024  # at a vocabulary of 128,256: 0.5 GB of logits in float32, 0.25 GB in 16 bits
LOSSES = ("auto", "liger", "chunked")


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        labelled = (targets != IGNORED).nonzero().squeeze(1)
        gradient = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            for part in labelled.split(CHUNK_ROWS):
                logits = F.linear(hidden.index_select(0, part), weight, bias)
                losses, d = _chunk(logits, targets.index_select(0, part), softcap, wanted)
                total += losses.sum()
                if gradient is not None:
                    gradient.index_copy_(0, part, d @ weight)
                del d, logits  # before the next chunk is made
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None, None


def in_one_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernel computes the losses of a chunk."""
    return (
        device.type == "cuda"
        and dtype in (torch.float32, torch.float16, torch.bfloat16)
        and fused.has_triton()
    )


def _chunk(logits: Tensor, targets: Tensor, softcap: float | None, wanted: bool) -> tuple[Tensor, Tensor]:
    """Losses (rows,) in float32 or wider, and the logits' gradient in their own place where it is wanted.

    Without Triton's kernel one more tensor of the logits' shape lives meanwhile (two with ``softcap``): a
    step's peak is here.
    """
    if in_one_kernel(logits.device, logits.dtype):
        from quant.backends import triton_loss

        losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        triton_loss.cross_entropy(logits, targets, losses, softcap=softcap, gradient=wanted)
        return losses, logits
    wide = logits if logits.element_size() >= 4 else torch.empty_like(logits, dtype=torch.float32)
    bent, capped = None, logits
    if softcap is not None:
        bent = torch.tanh(logits.to(wide.dtype) / softcap)
        capped = torch.mul(bent, softcap, out=wide)
    at = targets[:, None]
    chosen = capped.gather(1, at).to(wide.dtype)
    top = capped.amax(-1, keepdim=True).to(wide.dtype)  # wide, or a 16-bit subtraction would be rounded
    torch.sub(capped, top, out=wide).exp_()
    sums = wide.sum(-1, keepdim=True)
    losses = (top + sums.log() - chosen).squeeze(1)
    if not wanted:
        return losses, logits
    likely = (chosen - top).exp_().div_(sums) - 1.0  # of the target, before it is rounded
    if bent is not None:
        wide.div_(sums).scatter_(1, at, likely).mul_(bent.square_().neg_().add_(1.0))
        return losses, logits.copy_(wide)
    torch.div(wide, sums, out=logits)
    return losses, logits.scatter_(1, at, likely.to(logits.dtype))


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Sum of the negative log-likelihoods of ``targets`` under ``softmax(hidden @ weight^T + bias)``.

    Args:
        hidden: (rows, hidden_size). Only it gets a gradient.
        weight: (vocabulary, hidden_size), frozen.
        targets: int64 (rows,); rows with -100 are left out before anything is computed.
        bias: (vocabulary,), frozen.
        softcap: Gemma's bound c of the logits: c * tanh(logits / c).

    Returns:
        float32 scalar.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, softcap)
    return loss


def use_chunked_loss(model: Any, which: str = "auto") -> str:
    """Let a causal language model compute its loss so, wherever it is given labels; without, nothing changes.

    Args:
        model: A transformers causal language model, or one of our PeftModels around it.
        which: "liger": liger-kernel's function; "chunked": this module's; "auto": liger-kernel's where it
            can run.

    Returns:
        "liger" or "chunked"; "" where the model keeps its own loss over full logits: if the head trains, has
        an adapter, or the model does more between its hidden states and its logits than this module knows
        (checked on a few tokens).

    Raises:
        InputError: "liger" was asked for and cannot run here, or ``which`` is none of these.
    """
    if which not in LOSSES:
        raise InputError(f"loss={which!r}; allowed: {', '.join(LOSSES)}")
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    head: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    backbone = getattr(base, getattr(base, "base_model_prefix", ""), None)
    plain_head = type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())
    if backbone is None or backbone is base or not plain_head or not _agrees(base, backbone, head):
        if which == "liger":
            raise InputError("loss='liger': this model's head allows its own loss alone; use auto")
        return ""
    refused = "" if which == "chunked" else liger.why_not(head.weight, head.bias, _softcap(base))
    if which == "liger" and refused:
        raise InputError(f"loss='liger': {refused}")
    chosen = "chunked" if which == "chunked" or refused else "liger"
    attend_by_beginnings(base)  # where it cannot, or is not told of them, there is a mask
    base.forward = types.MethodType(functools.partial(_forward, chosen, takes_packed_mask(base)), base)
    return chosen


def loss_bytes(
    loss: str, *, tokens: int, vocabulary: int, hidden: int, element_size: int, in_place: bool = False
) -> int:
    """The most that the loss of a step holds at once on top of the layers' activations.

    Args:
        loss: What ``use_chunked_loss`` gave.
        tokens: Of the step, all labelled.
        vocabulary: Columns of the logits.
        hidden: Columns of the hidden states.
        element_size: Bytes of one of those.
        in_place: Triton's kernel computes a chunk.

    Returns:
        Bytes: the hidden states' gradient, logits with what is computed from them, and the labelled rows of
        the hidden states, of a chunk or (liger) all; without a chunked loss all logits in their own dtype,
        and two float32 tensors of that shape.
    """
    states = tokens * hidden * element_size
    if loss == "liger":
        chunk = liger.chunk_rows(tokens, vocabulary, hidden, CHUNK_ROWS) * vocabulary * element_size
        return 2 * states + chunk
    if loss == "chunked":
        wide = 4 if element_size < 4 and not in_place else 0
        a_row = vocabulary * (element_size + wide) + 2 * hidden * element_size
        return states + min(tokens, CHUNK_ROWS) * a_row
    return 2 * states + tokens * vocabulary * (element_size + 8)


def _softcap(base: Any) -> float | None:
    value = getattr(base.config, "final_logit_softcapping", None)
    return None if value is None else float(value)


def _scale(base: Any) -> float:
    """Granite divides its logits by a number, Cohere multiplies them."""
    divisor = getattr(base.config, "logits_scaling", None)
    factor = getattr(base.config, "logit_scale", None)
    return 1.0 / float(divisor) if divisor else float(factor) if factor else 1.0


@torch.no_grad()
def _agrees(base: Any, backbone: nn.Module, head: nn.Linear) -> bool:
    """Whether logits = softcap(head(scale * backbone)) for this model."""
    ids = torch.arange(8, device=head.weight.device)[None] % head.weight.shape[0]
    training = base.training
    base.eval()
    try:
        logits = base(input_ids=ids).logits.float()
        hidden = backbone(input_ids=ids)[0]
    finally:
        base.train(training)
    if hidden.shape[-1] != head.weight.shape[1]:
        return False
    mine = head(hidden * _scale(base)).float()
    cap = _softcap(base)
    mine = mine if cap is None else cap * torch.tanh(mine / cap)
    return bool(mine.shape == logits.shape and torch.allclose(mine, logits, rtol=1e-3, atol=1e-3))


def _forward(
    loss: str, one_mask: bool, self: Any, input_ids: Tensor | None = None, *, labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None, row_beginnings: Tensor | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    if labels is None:
        return type(self).forward(self, input_ids=input_ids, **kwargs)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    kwargs.pop("logits_to_keep", None)
    kwargs.pop("return_dict", None)
    kwargs.setdefault("use_cache", False)
    if row_beginnings is not None:
        kwargs["attention_mask"] = row_beginnings
    elif one_mask and kwargs.get("attention_mask") is None and kwargs.get("position_ids") is not None:
        kwargs["attention_mask"] = packed_mask(kwargs["position_ids"], attention_dtype(self))
    backbone, head = getattr(self, self.base_model_prefix), self.get_output_embeddings()
    output = backbone(input_ids=input_ids, **kwargs)
    hidden = output[0].flatten(0, 1)  # (tokens, hidden), uncut: a cut is a copy, and its gradient another
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten().to(hidden.device)
    scale = _scale(self)
    hidden = hidden if scale == 1.0 else hidden * scale
    if loss == "liger":
        total = liger.cross_entropy(hidden, head.weight, targets, CHUNK_ROWS)
    else:
        total = chunked_cross_entropy(hidden, head.weight, targets, head.bias, _softcap(self))
    count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return CausalLMOutputWithPast(loss=total / count)
