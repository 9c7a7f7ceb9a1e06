"""Cross entropy of a causal language model without its full logits.

Logits of a large vocabulary are the largest tensor of a training step: tokens x vocabulary x 4 bytes,
several times. Here they exist for a chunk of rows at a time, only of rows that have a label, and the
gradient of the hidden states is computed together with the loss, since the head is frozen.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import IGNORED

CHUNK_ROWS = 1024  # 0.5 GB of float32 logits at a vocabulary of 128,256


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], CHUNK_ROWS):
                rows = hidden[start : start + CHUNK_ROWS]  # (n, hidden)
                logits = F.linear(
                    rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)
                ).float()
                capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                here = targets[start : start + CHUNK_ROWS]
                log_sum = capped.logsumexp(-1, keepdim=True)
                total += (log_sum.squeeze(-1) - capped.gather(1, here[:, None]).squeeze(-1)).sum()
                if gradient is None:
                    continue
                d = (capped - log_sum).exp_()  # softmax
                d[torch.arange(here.numel(), device=d.device), here] -= 1.0
                if softcap is not None:
                    d *= 1.0 - (capped / softcap) ** 2
                gradient[start : start + CHUNK_ROWS] = d.to(rows.dtype) @ weight.to(rows.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None, None


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
    labelled = (targets != IGNORED).nonzero().squeeze(1)
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden[labelled], weight, bias, targets[labelled], softcap)
    return loss


def use_chunked_loss(model: Any) -> bool:
    """Let a causal language model compute its loss so, wherever it is given labels; without, nothing changes.

    Args:
        model: A transformers causal language model, or one of our PeftModels around it.

    Returns:
        Whether it was done: not if the head trains, has an adapter, or the model does more between its hidden
        states and its logits than this module knows (checked on a few tokens).
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    head: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    backbone = getattr(base, getattr(base, "base_model_prefix", ""), None)
    plain_head = type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())
    if backbone is None or backbone is base or not plain_head or not _agrees(base, backbone, head):
        return False
    base.forward = types.MethodType(_forward, base)
    return True


def _softcap(base: Any) -> float | None:
    value = getattr(base.config, "final_logit_softcapping", None)
    return None if value is None else float(value)


@torch.no_grad()
def _agrees(base: Any, backbone: nn.Module, head: nn.Linear) -> bool:
    """Whether logits = softcap(head(backbone)) for this model."""
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
    mine = head(hidden).float()
    cap = _softcap(base)
    mine = mine if cap is None else cap * torch.tanh(mine / cap)
    return bool(mine.shape == logits.shape and torch.allclose(mine, logits, rtol=1e-3, atol=1e-3))


def _forward(
    self: Any, input_ids: Tensor | None = None, *, labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    if labels is None:
        return type(self).forward(self, input_ids=input_ids, **kwargs)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    kwargs.pop("logits_to_keep", None)
    kwargs.pop("return_dict", None)
    kwargs.setdefault("use_cache", False)
    backbone, head = getattr(self, self.base_model_prefix), self.get_output_embeddings()
    output = backbone(input_ids=input_ids, **kwargs)
    hidden = output[0][:, :-1].flatten(0, 1)  # (tokens, hidden)
    targets = labels[:, 1:].flatten().to(hidden.device)
    total = chunked_cross_entropy(hidden, head.weight, targets, head.bias, _softcap(self))
    count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return CausalLMOutputWithPast(loss=total / count)
