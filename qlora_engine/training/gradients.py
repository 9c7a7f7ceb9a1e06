"""Gradients averaged over the processes after backward, for layers that DistributedDataParallel cannot watch.

DDP waits for autograd's nodes of the parameters, and a layer that is replayed from CUDA graphs adds to their
gradients without them. LoRA's gradients are few (168 MB for rank 16 on Llama-3-8B in float32), so that one
reduction behind backward costs little.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qlora_engine.distributed import world


def by_dtype(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in groups that fit into one tensor, in an order that all processes have."""
    groups: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.dtype, []).append(parameter)
    return list(groups.values())


@torch.no_grad()
def share_parameters(parameters: Sequence[nn.Parameter]) -> None:
    """Give all processes the first one's values, as DDP does when it wraps a model; all must call it."""
    if world().size == 1:
        return
    for group in by_dtype(parameters):
        flat = torch.cat([parameter.flatten() for parameter in group])
        torch.distributed.broadcast(flat, 0)
        for parameter, values in zip(group, _split(flat, group), strict=True):
            parameter.copy_(values)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes; all must call it.

    A process without a gradient of a parameter counts as zeros; where no process has one, there stays none.
    The gradients are views of one tensor for each dtype afterwards.
    """
    size = world().size
    if size == 1:
        return
    for group in by_dtype(parameters):
        there = [0.0 if parameter.grad is None else 1.0 for parameter in group]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        flat = torch.cat([*(part.flatten() for part in parts), parts[0].new_tensor(there)])
        del parts
        flat.div_(size)  # before the sum, which must not overflow
        torch.distributed.all_reduce(flat)
        reached = flat[-len(group) :].tolist()
        for parameter, gradient, count in zip(group, _split(flat, group), reached, strict=True):
            parameter.grad = gradient if count > 0 else None


def _split(flat: Tensor, group: list[nn.Parameter]) -> list[Tensor]:
    """The part of ``flat`` for each parameter, in its shape; what is behind them is left out."""
    sizes = [parameter.numel() for parameter in group]
    parts = flat[: sum(sizes)].split(sizes)
    return [part.view(parameter.shape) for part, parameter in zip(parts, group, strict=True)]
