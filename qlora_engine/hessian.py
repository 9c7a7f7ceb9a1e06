"""Second moments of layer inputs, H = E[x x^T]: accumulated over tokens, judged, and packed for storage.

H is what every calibrated solver measures with: tr(E H E^T) is the expected squared output error of a weight
error E. It is the mean over tokens, float32 (in, in); where that is too wide to hold, or the inputs are
one-hot (an embedding), only its diagonal (in,) is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_MIN_TILE = 128  # narrower products are slow in BLAS
_UNIT = 512  # tokens that count as one observation: neighbours in a text are not independent
_SKETCHES = 32  # random bilinear forms that stand for the matrix; their mean is good to about a tenth
# Rounding exploits chance correlations beyond their share in squared error. Chosen on SmolLM2 (block 3,
# widths 576 and 1536, 1024 to 32,768 tokens): the share of least output error on other text, after GPTQ and
# the closed form at rank 16, was 3 to 8 times the one of least squared error of H.
_CAUTION = 4.0
# What is left of the strongest correlations is worth much: at 64 tokens of width 576 the error is .93 times
# LoftQ's with a share of 1, .87 with .97.
_MOST = 0.95


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Matrix products in true float32 inside, whatever (TF32, bfloat16) the process allows outside."""
    both: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    backends = [backend for backend in both if hasattr(backend, "fp32_precision")]
    before = [backend.fp32_precision for backend in backends]
    tf32 = torch.backends.cuda.matmul.allow_tf32 if not backends else None  # torch < 2.9
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        if tf32 is not None:
            torch.backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision
        if tf32 is not None:
            torch.backends.cuda.matmul.allow_tf32 = tf32


class SecondMoment:
    """Running sum of x x^T over tokens, with their number.

    Products and sums are float32. Only the upper triangle is computed (five to six tenths of the work of the
    full product), so the mean is exactly symmetric.

    Args:
        width: Input features, or the vocabulary of an embedding.
        diagonal: Keep sum of x_i^2 alone.
        device: Where the sum lives; what is added is moved there.

    Attributes:
        tokens: Rows added so far.
        sum: float32 (width, width) with the lower triangle unfinished, or (width,).
        first: Sum of x, float32 (width,).
    """

    _scale: Tensor  # root mean square of each feature in the first rows, to weigh features alike
    _signs: Tensor  # (2, width, _SKETCHES)

    def __init__(
        self, width: int, *, diagonal: bool = False, device: torch.device | str | None = None
    ) -> None:
        if width < 1:
            raise ValueError(f"width must be positive, got {width}")
        self.width = width
        self.diagonal = diagonal
        self.tokens = 0
        self.sum = torch.zeros((width,) if diagonal else (width, width), device=device)
        self.first = torch.zeros(width, device=device)
        # West's running mean and squared deviation of v^T R u over units of tokens, for random signs v and u.
        self._mean = torch.zeros(_SKETCHES, device=device)
        self._spread = torch.zeros(_SKETCHES, device=device)
        self._weight = self._squared_weights = 0

    def add(self, x: Tensor, *, sign: int = 1) -> None:
        """Count tokens.

        Args:
            x: Inputs (..., width), any float dtype; every row is a token.
            sign: -1 takes away what was added before.

        Raises:
            ValueError: the last dimension of ``x`` is not ``width``.
            RuntimeError: the sum was released.
        """
        if not self.sum.numel():
            raise RuntimeError("the sum of this SecondMoment was released")
        if x.shape[-1:] != (self.width,):
            raise ValueError(f"inputs {tuple(x.shape)} do not have {self.width} features")
        rows = x.detach().reshape(-1, self.width).to(self.sum.device, torch.float32)  # (n, width)
        self.tokens += sign * rows.shape[0]
        self.first.add_(rows.sum(0), alpha=sign)
        if self.diagonal:
            self.sum.add_(rows.square().sum(0), alpha=sign)
            return
        self._sketch(rows, min(x.shape[-2] if x.ndim > 1 else 1, _UNIT), sign)
        tile = max(_MIN_TILE, -(-self.width // 8))
        with ieee_float32():
            for start in range(0, self.width, tile):
                stop = min(start + tile, self.width)
                self.sum[:stop, start:stop].addmm_(rows[:, :stop].T, rows[:, start:stop], alpha=sign)

    def _sketch(self, rows: Tensor, unit: int, sign: int) -> None:
        """Count units of rows (a text, or a piece of it) in the statistics of random bilinear forms of R."""
        if not rows.numel():
            return
        if not self._squared_weights:
            self._scale = rows.square().mean(0).sqrt()
            self._scale[self._scale == 0] = 1
            generator = torch.Generator().manual_seed(0)
            signs = torch.randint(0, 2, (2, self.width, _SKETCHES), generator=generator) * 2 - 1
            self._signs = signs.to(self.sum.device, torch.float32)
        with ieee_float32():
            z = rows / self._scale
            forms = (z @ self._signs[0]) * (z @ self._signs[1])  # (n, _SKETCHES)
        for piece in forms.split(unit)[::sign]:
            weight, form = piece.shape[0], piece.mean(0)
            if sign > 0:
                before, after = self._weight, self._weight + weight
                deviation = form - self._mean
                self._mean += deviation * (weight / after)
            else:
                before, after = self._weight - weight, self._weight
                if before:
                    self._mean += (self._mean - form) * (weight / before)
                deviation = form - self._mean
            self._spread.add_(deviation.square(), alpha=sign * weight * before / after)
            self._weight += sign * weight
            self._squared_weights += sign * weight * weight

    def shrinkage(self, mean: Tensor) -> float:
        """How far to shrink the correlations of H before rounding in it, in [0, .95] (``shrink``).

        A second moment of few tokens has correlations that the next text has not. Their expected square,
        relative to that of all correlations, is estimated from how much units of text differ, after Schäfer
        and Strimmer 2005 (doi 10.2202/1544-6115.1175), every feature scaled alike; from fewer than two units,
        as if tokens were independent and normal.

        Measured at 3 bits, damping .01, as a multiple of LoftQ's error on other text: width 1536 from 4096
        tokens .992 unshrunk and .857 shrunk, from 32,768 .830 and .820; width 576 .757 and .738, .707 and
        .707; from 512 tokens that were drawn singly 1.14 and .88, .98 and .76.

        Args:
            mean: What ``mean`` returned.
        """
        if self.diagonal or self.width == 1 or not self.tokens:
            return 0.0
        correlated = 0.0  # sum of squared scaled entries off the diagonal
        for rows, scales in zip(mean.split(1024), self._scale.split(1024)):
            correlated += float((rows / self._scale / scales[:, None]).square().sum(dtype=torch.float64))
        own = float((mean.diagonal() / self._scale.square()).square().sum())
        correlated = max(correlated - own, 0.0)
        if not correlated:
            return 0.0
        units = self._weight**2 / self._squared_weights
        if units >= 2:
            chance = float(self._spread.mean()) / self._weight / (units - 1)
        else:
            chance = (correlated + self.width**2) / self.tokens
        return min(_CAUTION * chance / correlated, _MOST)

    def add_ids(self, ids: Tensor) -> None:
        """Count one-hot inputs, given as indices of any shape: the inputs of an embedding.

        Raises:
            ValueError: this one is not diagonal.
            IndexError: an id outside [0, width).
        """
        if not self.diagonal:
            raise ValueError("one-hot inputs need SecondMoment(diagonal=True)")
        flat = ids.detach().reshape(-1).to(self.sum.device, torch.long)
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < self.width:
            raise IndexError(f"ids in [{int(flat.min())}, {int(flat.max())}] for {self.width} embeddings")
        self.tokens += flat.numel()
        counts = torch.bincount(flat, minlength=self.width)
        self.sum += counts
        self.first += counts

    def copy(self) -> SecondMoment:
        """An independent one with the same tokens."""
        other = SecondMoment(self.width, diagonal=self.diagonal, device=self.sum.device)
        other.sum.copy_(self.sum)
        other.first.copy_(self.first)
        other._mean, other._spread = self._mean.clone(), self._spread.clone()
        other._weight, other._squared_weights = self._weight, self._squared_weights
        if self._squared_weights:
            other._scale, other._signs = self._scale, self._signs
        other.tokens = self.tokens
        return other

    def mean(self, *, release: bool = False) -> Tensor:
        """H: float32 (width, width), symmetric, or its diagonal (width,); zero if no token was added.

        ``release`` makes it of the sum itself, without a second matrix; nothing can be added afterwards.
        """
        mean = self.sum.div_(max(self.tokens, 1)) if release else self.sum / max(self.tokens, 1)
        if release:
            self.sum = mean.new_empty(0)
        return mean if self.diagonal else mirror_(mean)

    def mean_input(self) -> Tensor:
        """E[x], float32 (width,)."""
        return self.first / max(self.tokens, 1)


class CrossMoment:
    """Running sum of y x^T over tokens for two views of one input, drifted y and original x: E[y x^T]."""

    def __init__(self, width: int, *, device: torch.device | str | None = None) -> None:
        self.width = width
        self.tokens = 0
        self.sum = torch.zeros(width, width, device=device)

    def add(self, y: Tensor, x: Tensor, *, sign: int = 1) -> None:
        """Count tokens of ``y`` and ``x``, both (..., width), row by row the same; ``sign`` -1 takes away.

        Raises:
            ValueError: shapes that differ, or another width.
        """
        if y.shape != x.shape or x.shape[-1:] != (self.width,):
            raise ValueError(
                f"inputs {tuple(y.shape)} and {tuple(x.shape)}, expected (..., {self.width}) twice"
            )
        drifted = y.detach().reshape(-1, self.width).to(self.sum.device, torch.float32)
        original = x.detach().reshape(-1, self.width).to(self.sum.device, torch.float32)
        self.tokens += sign * original.shape[0]
        with ieee_float32():
            self.sum.addmm_(drifted.T, original, alpha=sign)

    def copy(self) -> CrossMoment:
        """An independent one with the same tokens."""
        other = CrossMoment(self.width, device=self.sum.device)
        other.sum.copy_(self.sum)
        other.tokens = self.tokens
        return other

    def mean(self, *, release: bool = False) -> Tensor:
        """float32 (width, width), not symmetric, rows of the drifted view; ``release`` as above."""
        mean = self.sum.div_(max(self.tokens, 1)) if release else self.sum / max(self.tokens, 1)
        if release:
            self.sum = mean.new_empty(0)
        return mean


def mirror_(matrix: Tensor) -> Tensor:
    """Copy the upper triangle of a square matrix onto the lower, in place and without a second matrix."""
    n = matrix.shape[0]
    for start in range(0, n, 1024):
        stop = min(start + 1024, n)
        square = matrix[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
    return matrix


def pack_upper(matrix: Tensor) -> Tensor:
    """Upper triangle row by row: symmetric (n, n) -> (n (n + 1) / 2,)."""
    return torch.cat([matrix[i, i:] for i in range(matrix.shape[0])])


def unpack_upper(packed: Tensor, n: int) -> Tensor:
    """The inverse of ``pack_upper``.

    Raises:
        ValueError: ``packed`` does not have n (n + 1) / 2 elements.
    """
    if packed.shape != (n * (n + 1) // 2,):
        raise ValueError(f"{tuple(packed.shape)} is not the upper triangle of a matrix of {n} columns")
    matrix = packed.new_empty(n, n)
    start = 0
    for i in range(n):
        matrix[i, i:] = packed[start : start + n - i]
        start += n - i
    return mirror_(matrix)


def diagonal(hessian: Tensor) -> Tensor:
    """Mean squared input by feature (in,), of a full H (in, in) or of one that is already its diagonal."""
    return hessian if hessian.ndim == 1 else hessian.diagonal()


def dead_inputs(hessian: Tensor) -> Tensor:
    """Which features no token ever reached: bool (in,). Their columns of the weight do not matter to H."""
    return diagonal(hessian) == 0


def shrink(hessian: Tensor, share: float) -> Tensor:
    """H with its off-diagonal part reduced by ``share``: (in, in), a copy. A diagonal (in,) stays."""
    if hessian.ndim == 1:
        return hessian
    shrunk = hessian * (1 - share)
    shrunk.diagonal().copy_(hessian.diagonal())
    return shrunk


def energy(error: Tensor, hessian: Tensor | None) -> float:
    """tr(E H E^T), the expected squared output error of a weight error.

    Args:
        error: E (out, in).
        hessian: (in, in), its diagonal (in,), or None for the identity: then ||E||_F^2.
    """
    error = error.float()
    if hessian is None:
        return float(error.double().square().sum())
    if hessian.ndim == 1:
        return float((error.square() * hessian).sum(dtype=torch.float64))
    with ieee_float32():
        # E H E^T is positive, so its trace is not a difference of large numbers: float32 is enough.
        return max(float(((error @ hessian) * error).sum(dtype=torch.float64)), 0.0)


def condition(hessian: Tensor, *, steps: int = 30) -> float:
    """Estimate of the largest over the smallest eigenvalue of H; infinite where H is singular in float64.

    Power iteration for the one and, through a Cholesky factor, inverse iteration for the other: Rayleigh
    quotients, so the figure errs low, by a few per cent. n^3 / 3 operations in float64.

    Args:
        hessian: (in, in) or its diagonal (in,).
        steps: Iterations of either kind.
    """
    if hessian.ndim == 1:
        least = float(hessian.min())
        return float(hessian.max()) / least if least > 0 else math.inf
    exact = hessian.double()
    factor, info = torch.linalg.cholesky_ex(exact)
    if int(info) != 0:
        return math.inf
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(exact.shape[0], 1, generator=generator, dtype=torch.float64).to(exact.device)
    large = small = start / start.norm()
    for _ in range(steps):
        large = exact @ large
        large = large / large.norm()
        small = torch.cholesky_solve(small, factor)
        small = small / small.norm()
    most = float((large.T @ exact @ large).item())
    least = 1 / float((small.T @ torch.cholesky_solve(small, factor)).item())
    return most / least
