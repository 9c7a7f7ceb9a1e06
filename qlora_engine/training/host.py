"""What may wait in the host's memory instead of the GPU's: the embedding, inputs of recomputed layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_engine.errors import InputError
from qlora_engine.tuner_layer import BaseTunerLayer

from .recompute import decoder_layers, is_sharded, unwrapped

OFFLOADS = ("embedding", "activations")


def parse_offload(text: str | None) -> tuple[str, ...]:
    """``--offload``'s value: names with commas between.

    Raises:
        InputError: another name.
    """
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip() not in ("", "none"))
    for name in names:
        if name not in OFFLOADS:
            raise InputError(f"offload={name!r}; allowed: none, {', '.join(OFFLOADS)}, or both with a comma")
    return names


class HostEmbedding(nn.Module):
    """A frozen embedding whose table stays on the host: rows are looked up there, then sent to the device.

    The table is no Parameter, so that neither ``.to`` nor DDP touches it.

    Args:
        embedding: A plain nn.Embedding, or a subclass that only scales its rows (``embed_scale``).
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        table = embedding.weight.detach().cpu()
        self._table = [table.pin_memory() if torch.cuda.is_available() else table]
        scale = getattr(embedding, "embed_scale", None)
        self._scale = None if scale is None else float(scale)

    @property
    def weight(self) -> Tensor:
        """The table, (num_embeddings, embedding_dim), on the host."""
        return self._table[0]

    def forward(self, input: Tensor) -> Tensor:
        """Token ids (any shape, integer, any device) -> rows on the ids' device, (*shape, embedding_dim)."""
        rows = F.embedding(input.cpu(), self.weight).to(input.device, non_blocking=True)
        return rows if self._scale is None else rows * self._scale


def embedding_to_host(model: Any) -> int:
    """Put the input embedding's table on the host; returns the bytes that the GPU does not hold then.

    Raises:
        InputError: the table is also the output head's, trains, has an adapter or is quantised.
    """
    base: Any = unwrapped(model)
    embedding = base.get_input_embeddings()
    if isinstance(embedding, HostEmbedding):
        return embedding.weight.nbytes
    head = base.get_output_embeddings()
    why = ""
    if isinstance(embedding, BaseTunerLayer) or not isinstance(embedding, nn.Embedding):
        why = "has an adapter or is quantised"
    elif embedding.weight.requires_grad:
        why = "is trained"
    elif head is not None and getattr(head, "weight", None) is embedding.weight:
        why = "is also the output head, which the GPU needs"
    if why:
        raise InputError(f"--offload embedding: this model's embedding {why}")
    host = HostEmbedding(embedding)
    base.set_input_embeddings(host)
    return host.weight.nbytes


def activations_to_host(model: nn.Module) -> None:
    """Let recomputed layers keep their input on the host; call it after ``recompute.apply``."""
    function = checkpoint_shards_on_host if is_sharded(model) else checkpoint_on_host
    for layer in decoder_layers(model):
        layer._gradient_checkpointing_func = function  # type: ignore[assignment]


def checkpoint_shards_on_host(function: Callable[..., Any], *inputs: Any) -> Any:
    """``checkpoint_on_host`` for a layer whose weights FSDP gathers and frees again.

    FSDP's hooks want the layer in one backward pass with the others: torch's own checkpointing does that,
    and what it keeps of the inputs passes through the hooks here.
    """
    with torch.autograd.graph.saved_tensors_hooks(_to_host, _from_host):
        return checkpoint(function, *inputs, use_reentrant=False)


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    if tensor.device.type != "cuda":
        return tensor.device, tensor.detach().clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return tensor.device, host.copy_(tensor.detach(), non_blocking=True)  # backward is on the same stream


def _from_host(kept: tuple[torch.device, Tensor]) -> Tensor:
    device, host = kept
    return host.to(device, non_blocking=True)


def checkpoint_on_host(function: Callable[..., Any], hidden: Tensor, *rest: Any) -> Any:
    """``function(hidden, *rest)``, of which only ``hidden`` is kept for backward, on the host.

    Backward brings it back and computes the rest again, with the random state of the first time.

    Args:
        function: A decoder layer; gradients reach ``hidden`` and whatever parameters it uses.
        hidden: Its input, which must require a gradient.
        rest: What needs no gradient.
    """
    return _Checkpoint.apply(function, rest, hidden)


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], rest: tuple[Any, ...], hidden: Tensor) -> Any:
        ctx.function, ctx.rest, ctx.device = function, rest, hidden.device
        ctx.random = torch.get_rng_state()
        ctx.autocast = (
            torch.is_autocast_enabled(hidden.device.type),
            torch.get_autocast_dtype(hidden.device.type),
        )
        if hidden.device.type == "cuda":
            ctx.random_gpu = torch.cuda.get_rng_state(hidden.device)
            host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
            host.copy_(hidden, non_blocking=True)
            ctx.copied = torch.cuda.Event()
            ctx.copied.record()
        else:
            host = hidden.detach().clone()
        ctx.save_for_backward(host)
        with torch.no_grad():
            return function(hidden, *rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (host,) = ctx.saved_tensors
        on_gpu = ctx.device.type == "cuda"
        if on_gpu:
            ctx.copied.synchronize()
        hidden = host.to(ctx.device, non_blocking=True).requires_grad_()
        enabled, dtype = ctx.autocast
        with torch.random.fork_rng(devices=[ctx.device] if on_gpu else []), torch.enable_grad():
            torch.set_rng_state(ctx.random)
            if on_gpu:
                torch.cuda.set_rng_state(ctx.random_gpu, ctx.device)
            with torch.autocast(ctx.device.type, dtype=dtype, enabled=enabled):
                out = ctx.function(hidden, *ctx.rest)
        outputs = out if isinstance(out, tuple) else (out,)
        pairs = [
            (o, g) for o, g in zip(outputs, grads, strict=True) if isinstance(o, Tensor) and o.requires_grad
        ]
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        return None, None, hidden.grad


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
