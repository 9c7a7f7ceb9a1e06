"""Combine the low-rank factors of several adapters of one layer into the factors of one.

Factors here are batched by group, ``A`` (groups, r, in) and ``B`` (groups, out, r), float32 or float64: a
grouped convolution is that many independent low-rank problems, every other layer has one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_engine.task_vectors import MajoritySign, combine

ELEMENTWISE = ("linear", "ties", "dare_ties", "dare_linear", "magnitude_prune")
DENSE_SVD = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
COMBINATION_TYPES = ("svd", "cat", *ELEMENTWISE, *DENSE_SVD)
PRUNING = (*ELEMENTWISE[1:], *DENSE_SVD)


@dataclass(frozen=True)
class Factors:
    """One adapter's part in one layer: it adds ``weight * scaling * B @ A``."""

    A: Tensor  # (groups, r, in)
    B: Tensor  # (groups, out, r)
    scaling: float
    weight: float

    @property
    def rank(self) -> int:
        """The inner dimension, by group."""
        return self.A.shape[1]

    @property
    def coefficient(self) -> float:
        """What multiplies ``B @ A`` in the exact combination."""
        return self.weight * self.scaling


def combine_factors(
    combination_type: str,
    factors: Sequence[Factors],
    rank: int,
    *,
    density: float | None = None,
    majority_sign_method: MajoritySign = "total",
    svd_clamp: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Factors A (groups, rank, in) and B (groups, out, rank) that combine ``factors`` at scaling 1.

    Args:
        combination_type: One of ``COMBINATION_TYPES``.

            - ``cat`` stacks: exact, the inner dimension is the sum of the ranks.
            - ``svd`` is the best approximation of the exact sum at ``rank``: QR of the stacked factors and
              the SVD of their small core. No dense delta is formed.
            - ``linear`` is PEFT's: with ``root = sqrt(abs(c))`` of each coefficient c,
              ``A' = sum(sign(c) root A)`` and ``B' = sum(root B)``. Their product is not ``sum(c B A)``: n
              adapters also give the n (n - 1) cross terms ``root_i sign(c_j) root_j B_i A_j``. Exact for one
              adapter only.
            - ``ties``, ``dare_ties``, ``dare_linear`` and ``magnitude_prune`` combine A and B apart with the
              same roots, hence with the same cross terms.
            - the same names with ``_svd`` combine dense deltas, then the best approximation at ``rank``.
        factors: At least one; the elementwise types need equal ranks.
        rank: Inner dimension of the result; missing directions are zeros.
        density: Share of entries that pruning keeps; required by ``PRUNING``.
        majority_sign_method: How TIES elects a sign: by summed value ("total") or by count ("frequency").
        svd_clamp: Quantile in [0, 1] of the entries of both factors beyond which an SVD is clamped.

    Source: the SVD of a product from its factors: Golub & Van Loan, Matrix Computations, 4th ed., 8.6.
    """
    if combination_type == "cat":
        A = torch.cat([f.coefficient * f.A for f in factors], dim=1)
        B = torch.cat([f.B for f in factors], dim=2)
    elif combination_type in ELEMENTWISE:
        roots = [math.sqrt(abs(f.coefficient)) for f in factors]
        signed = [math.copysign(root, f.coefficient) for root, f in zip(roots, factors)]
        mix = _mixer(combination_type, density, majority_sign_method)
        A, B = mix([f.A for f in factors], signed), mix([f.B for f in factors], roots)
    elif combination_type == "svd":
        A, B = _clamp(*_svd_of_sum(factors, rank), svd_clamp)
    elif combination_type in DENSE_SVD:
        mix = _mixer(combination_type.removesuffix("_svd"), density, majority_sign_method)
        delta = mix(
            [f.scaling * f.B @ f.A for f in factors], [f.weight for f in factors]
        )  # (groups, out, in)
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        A, B = _clamp(*_split_svd(U, S, Vh, rank), svd_clamp)
    else:
        raise ValueError(f"Invalid combination_type: {combination_type}")
    return pad_rank(A, rank, dim=1), pad_rank(B, rank, dim=2)


def svd_of_product(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD (U, S, Vh) of ``B @ A``, (..., out, r) by (..., r, in), without forming it.

    ``k = min(out, r, in)`` singular values. QR of B and of A's transpose leave an r by r core.
    """
    Qb, Rb = torch.linalg.qr(B)  # (..., out, min(out, r)), (..., min(out, r), r)
    Qa, Ra = torch.linalg.qr(A.mT)  # (..., in, min(in, r)), (..., min(in, r), r)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    return Qb @ U, S, Vh @ Qa.mT


def pad_rank(factor: Tensor, rank: int, dim: int) -> Tensor:
    """``factor`` with zeros appended along ``dim`` up to ``rank``."""
    missing = rank - factor.shape[dim]
    if missing < 0:
        raise ValueError(f"factors of rank {factor.shape[dim]} do not fit in rank {rank}")
    if missing == 0:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim)


def quantile(values: Tensor, q: float) -> Tensor:
    """The ``q``-quantile, interpolated, of any number of values (torch.quantile stops at 16 million)."""
    flat = values.reshape(-1)
    position = q * (flat.numel() - 1)
    low = math.floor(position)
    below = torch.kthvalue(flat, low + 1).values
    above = torch.kthvalue(flat, min(low + 2, flat.numel())).values
    return torch.lerp(below, above, position - low)


def _svd_of_sum(factors: Sequence[Factors], rank: int) -> tuple[Tensor, Tensor]:
    B = torch.cat([f.coefficient * f.B for f in factors], dim=2)
    A = torch.cat([f.A for f in factors], dim=1)
    return _split_svd(*svd_of_product(B, A), rank)


def _split_svd(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B) = (Vh, U S), as PEFT splits them."""
    return Vh[:, :rank], U[:, :, :rank] * S[:, None, :rank]


def _clamp(A: Tensor, B: Tensor, q: float | None) -> tuple[Tensor, Tensor]:
    if q is None:
        return A, B
    bound = quantile(torch.cat([B.reshape(-1), A.reshape(-1)]), q)
    return A.clamp(-bound, bound), B.clamp(-bound, bound)


def _mixer(
    method: str, density: float | None, majority_sign_method: MajoritySign
) -> Callable[[Sequence[Tensor], Sequence[float]], Tensor]:
    def mix(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return combine(method, tensors, tensors[0].new_tensor(weights), density, majority_sign_method)

    return mix
