"""Principal components of rows that come in batches, without keeping the rows or their covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from .lowrank import truncated_svd

_SPARE = 10  # components kept beyond those asked for: what is cut off in one batch may matter with the next


class RunningPCA:
    """The leading principal components of all rows seen so far (Ross et al. 2008, section 3.1).

    After each batch the SVD is taken of what is kept, the batch's deviations from its mean, and one row for
    the shift of the mean. Exact while the rows span no more directions than are kept; memory is
    (components + 10) rows, where a covariance would need as many rows as there are features.

    Args:
        width: Features of a row.
        components: How many are wanted, in [1, width].

    Attributes:
        tokens: Rows seen.
    """

    def __init__(self, width: int, components: int) -> None:
        if not 1 <= components <= width:
            raise ValueError(f"{components} components of rows with {width} features")
        self.wanted = components
        self.tokens = 0
        self._keep = min(width, components + _SPARE)
        self._mean = torch.zeros(width)
        self._scaled = torch.zeros(0, width)  # singular values times directions
        self._values = torch.zeros(0)
        self._directions = torch.zeros(0, width)
        self._total = 0.0  # sum of squared deviations, over all directions

    def add(self, rows: Tensor) -> None:
        """Count rows (n, width), any float dtype; computed in float32 where they are."""
        rows = rows.detach().float()
        if not len(rows):
            return
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("inputs are not finite; run the model in float32 or bfloat16, not float16")
        before, new = self.tokens, len(rows)
        mean = rows.mean(0)
        deviations = rows - mean
        self._mean, self._scaled = self._mean.to(rows.device), self._scaled.to(rows.device)
        shift = (before * new / (before + new)) ** 0.5 * (self._mean - mean)
        self._total += float(deviations.square().sum() + shift.square().sum())
        stack = torch.cat([self._scaled, deviations, shift.unsqueeze(0)])
        _, values, directions = truncated_svd(stack, min(self._keep, *stack.shape))
        self._values, self._directions = values, directions
        self._scaled = values.unsqueeze(1) * directions
        self._mean = self._mean + (mean - self._mean) * (new / (before + new))
        self.tokens = before + new

    @property
    def components(self) -> Tensor:
        """Orthonormal directions (k, width), the strongest first, float32, the largest element positive.

        k is the number asked for, or fewer while too few rows were seen.
        """
        found = self._directions[: min(self.wanted, max(0, self.tokens - 1))]
        if not len(found):
            return found
        largest = found.gather(1, found.abs().argmax(dim=1, keepdim=True))
        return found * torch.where(largest < 0, -1.0, 1.0)

    @property
    def singular_values(self) -> Tensor:
        """Of the centred matrix of all rows, (k,), one for each component."""
        return self._values[: len(self.components)]

    @property
    def explained_variance_ratio(self) -> Tensor:
        """The share of all variance along each component, (k,)."""
        return self.singular_values.square() / max(self._total, torch.finfo(torch.float32).tiny)
