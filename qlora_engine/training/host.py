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

from .recompute import decoder_layers, unwrapped

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
    for layer in decoder_layers(model):
        layer._gradient_checkpointing_func = checkpoint_on_host  # type: ignore[assignment]


def checkpoint_on_host(function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``, of which only ``inputs`` are kept for backward, on the host.

    Backward brings them back and computes the rest again as far as it has to, with the random state of the
    first time: torch's own checkpointing, in which FSDP can gather and free a layer's weights, and what it
    keeps of the inputs passes through the hooks here.

    Args:
        function: A decoder layer.
        inputs: Its positional arguments; what it has by keyword stays where it is.
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
