"""Sparsify and add task vectors: the tensor arithmetic behind ``add_weighted_adapter``.

A *task vector* is what one adapter adds: its factor A, its factor B, or its dense delta. Every function takes
plain tensors, changes none of its arguments and keeps their dtype and device.

Sources: Ilharco et al. 2023, arXiv:2212.04089 (task arithmetic); Yadav et al. 2023, arXiv:2306.01708 (TIES);
Yu et al. 2024, arXiv:2311.03099 (DARE). Names and rules are those of PEFT's ``merge_utils``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

MajoritySign = Literal["total", "frequency"]


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """View ``weights`` (n,) as (n, 1, ..., 1) so that it multiplies ``task_tensors`` (n, ...)."""
    return weights.reshape(weights.shape + (1,) * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """Keep the ``int(density * numel)`` entries of largest magnitude, zero the rest."""
    flat = tensor.reshape(-1)
    kept = torch.topk(flat.abs(), k=int(density * flat.numel()), largest=True).indices
    pruned = torch.zeros_like(flat)
    pruned[kept] = flat[kept]
    return pruned.reshape(tensor.shape)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Keep each entry with probability ``density``; ``rescale`` divides by it, so that the expectation stays.

    A density of 0 gives zeros (and not 0/0).
    """
    pruned = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return pruned / density if rescale and density > 0 else pruned


def prune(
    tensor: Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False
) -> Tensor:
    """Prune ``tensor`` to ``density``; 1 or more warns and prunes nothing.

    Raises:
        ValueError: ``density`` is negative, or ``method`` is unknown.
    """
    if density >= 1:
        warnings.warn(
            f"The density {density} is greater than or equal to 1, no pruning will be performed.",
            stacklevel=2,
        )
        return tensor
    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale=rescale)
    raise ValueError(f"Unknown method {method}")


def calculate_majority_sign_mask(tensor: Tensor, method: MajoritySign = "total") -> Tensor:
    """Which entries of the stack ``tensor`` (n, ...) have the sign that the majority elects, (n, ...) bool.

    ``"total"`` lets the summed values vote, ``"frequency"`` the count of signs; a draw elects +. A zero never
    agrees.
    """
    sign = tensor.sign()
    if method == "total":
        vote = tensor.sum(dim=0)
    elif method == "frequency":
        vote = sign.sum(dim=0)
    else:
        raise RuntimeError(f'Unimplemented mask method "{method}"')
    return sign == torch.where(vote >= 0, 1, -1)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """Mean over the entries that the mask keeps, (n, ...) -> (...); where it keeps none the result is 0."""
    count = majority_sign_mask.sum(dim=0).clamp(min=1)
    return (task_tensors * majority_sign_mask).sum(dim=0) / count


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum of the task tensors."""
    stacked = torch.stack(list(task_tensors), dim=0)
    return (stacked * reshape_weight_task_tensors(stacked, weights)).sum(dim=0)


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """Prune each by magnitude, then the weighted sum."""
    return task_arithmetic([prune(t, density, method="magnitude") for t in task_tensors], weights)


def dare_linear(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """Drop at random and rescale each, then the weighted sum."""
    return task_arithmetic([prune(t, density, method="random", rescale=True) for t in task_tensors], weights)


def ties(
    task_tensors: Sequence[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: MajoritySign = "total",
) -> Tensor:
    """Prune each by magnitude, elect a sign by entry, then the weighted mean of those that agree with it."""
    pruned = [prune(t, density, method="magnitude") for t in task_tensors]
    return _elect_and_average(pruned, weights, majority_sign_method)


def dare_ties(
    task_tensors: Sequence[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: MajoritySign = "total",
) -> Tensor:
    """Drop at random and rescale each, elect a sign by entry, then the weighted mean of those that agree."""
    pruned = [prune(t, density, method="random", rescale=True) for t in task_tensors]
    return _elect_and_average(pruned, weights, majority_sign_method)


def _elect_and_average(
    pruned: Sequence[Tensor], weights: Tensor, majority_sign_method: MajoritySign
) -> Tensor:
    stacked = torch.stack(list(pruned), dim=0)
    mask = calculate_majority_sign_mask(stacked, method=majority_sign_method)
    return disjoint_merge(stacked * reshape_weight_task_tensors(stacked, weights), mask)


def combine(
    method: str,
    task_tensors: Sequence[Tensor],
    weights: Tensor,
    density: float | None = None,
    majority_sign_method: MajoritySign = "total",
) -> Tensor:
    """Combine task tensors by name: linear, magnitude_prune, dare_linear, ties or dare_ties.

    ``density`` is required by all but linear.
    """
    if method == "linear":
        return task_arithmetic(task_tensors, weights)
    if density is None:
        raise ValueError(f"combination type {method!r} needs a density in [0, 1], got None")
    if method == "magnitude_prune":
        return magnitude_prune(task_tensors, weights, density)
    if method == "dare_linear":
        return dare_linear(task_tensors, weights, density)
    if method == "ties":
        return ties(task_tensors, weights, density, majority_sign_method)
    if method == "dare_ties":
        return dare_ties(task_tensors, weights, density, majority_sign_method)
    raise ValueError(f"Invalid combination_type: {method}")
