"""A run's settings put to the model before training: the loss, what waits on the host, the memory plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qlora_engine import distributed, fused_blocks

from .host import embedding_to_host, parse_offload
from .loss import use_chunked_loss
from .optimizers import state_bytes
from .prepare import keeps_packed_rows_apart
from .recompute import MemoryPlan, plan, unwrapped
from .settings import Settings, can_shard, precision_of

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def fit(model: Any, settings: Settings, packed: bool | None = None) -> MemoryPlan:
    """Fuse what can be on a GPU, choose the loss, put the embedding where it is wanted, and plan a step.

    Several processes take the plan of the one that has to recompute most: layers of a sharded model are
    gathered by all of them together, so all must run the same ones.

    Args:
        model: One of our PeftModels, on its device.
        settings: The run.
        packed: Whether rows are packed; None: found out.

    Raises:
        InputError: the model does not allow what is asked for, or a step does not fit.
    """
    settings = within_window(model, settings)
    offload = parse_offload(settings.offload)
    device = next(model.parameters()).device
    if device.type == "cuda":  # first: fused layers keep less
        fused_blocks.enable(model)
    loss_function = use_chunked_loss(model, settings.loss)
    if "embedding" in offload:
        embedding_to_host(model)
    if packed is None:
        vocabulary = unwrapped(model).config.get_text_config().vocab_size
        packed = settings.packing != "off" and keeps_packed_rows_apart(model, vocabulary)
    made = distributed.together(
        lambda: plan(
            model,
            batch_size=settings.batch_size,
            length=settings.max_length,
            recompute=settings.recompute,
            available=None if settings.memory_limit is None else max(1, int(settings.memory_limit * 2**30)),
            optimizer_bytes=state_bytes(settings.optimizer),
            inputs_on_host="activations" in offload,
            loss_function=loss_function,
            packed=_DTYPES[precision_of(settings.precision, device)] if packed else None,
        )
    )
    return max(distributed.gather(made), key=lambda other: (other.recomputed, other.total - other.available))


def within_window(model: Any, settings: Settings) -> Settings:
    """The settings with ``max_length`` lowered to the tokens that the model has positions for."""
    window = getattr(unwrapped(model).config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(window, int) or window < 2 or settings.max_length <= window:
        return settings
    return replace(settings, max_length=window)


def when_out_of_memory(settings: Settings) -> str:
    """What to change, the cheapest first."""
    offload = parse_offload(settings.offload)
    large_state = state_bytes(settings.optimizer) > 4
    ways = [
        (settings.recompute != "full", "--recompute full"),
        ("activations" not in offload, "--offload activations"),
        ("embedding" not in offload, "--offload embedding"),
        (large_state and not settings.shard, "--optimizer paged_adamw_8bit"),
        (settings.batch_size > 1, f"--batch-size {max(1, settings.batch_size // 2)} with --accumulate"),
        (True, f"a --max-length below {settings.max_length}"),
        (not settings.shard and can_shard(), "several GPUs: torchrun with --shard"),
    ]
    return ", ".join(text for possible, text in ways if possible)
