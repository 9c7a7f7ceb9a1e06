"""What a method that initialises an adapter gets, gives back and says about itself."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_engine.errors import InputError
from qlora_engine.lowrank import SVD_METHODS, LowRankFactors
from quant import QuantizedTensor, QuantSpec
from quant.tensor import SCALE_RULES

KINDS = ("linear", "embedding")
STARTS = ("zero", "svd")


@dataclass(frozen=True, eq=False)
class InitRequest:
    """What to solve for, beside the weight.

    Attributes:
        rank: In [1, min(weight.shape)].
        spec: How the base is quantised; None: it stays dense.
        iters: Alternations of iterative methods, at least 1.
        scales: Rule of the block scales: "absmax", "mse" or "signed-mse".
        svd: "fast" (residual within 1.001 of the best) or "exact".
        start: Of LoftQ's alternation: "zero", or "svd" of the weight (QPiSSA).
        seed: Of everything random. None: torch's global generator, as PEFT does.
        hessian: Second moment E[x x^T] of the layer's inputs, float32 (in, in), or only its diagonal (in,);
            not damped.
        damping: Multiple of the mean of diag(hessian) that methods add to it before they factorise it.
        mean: Mean input, (in,), and ``tokens``, how many inputs were seen: EVA uses both.
        whiten: EVA: divide the directions by the root of their singular values.
        kind: "linear" or "embedding", whose trainable start differs in PEFT.
        name: Of the weight: named in errors, and part of the seed, so that layers differ.

    Raises:
        InputError: a value that is not allowed.
    """

    rank: int
    spec: QuantSpec | None = None
    iters: int = 5
    scales: str = "absmax"
    svd: str = "fast"
    start: str = "zero"
    seed: int | None = 0
    hessian: Tensor | None = None
    damping: float = 0.01
    mean: Tensor | None = None
    tokens: int | None = None
    whiten: bool = False
    kind: str = "linear"
    name: str | None = None

    def __post_init__(self) -> None:
        choices = (("scales", SCALE_RULES), ("svd", SVD_METHODS), ("start", STARTS), ("kind", KINDS))
        for field, allowed in choices:
            if getattr(self, field) not in allowed:
                raise InputError(f"{field}={getattr(self, field)!r}; allowed: {', '.join(allowed)}")
        if isinstance(self.iters, bool) or not isinstance(self.iters, int) or self.iters < 1:
            raise InputError(f"iters={self.iters!r}; it must be an integer of at least 1")
        if not self.damping >= 0:
            raise InputError(f"damping={self.damping!r}; it must not be negative")

    @property
    def svd_seed(self) -> int:
        """Seed of the truncated SVD's random block."""
        return 0 if self.seed is None else self.seed

    def generator(self) -> torch.Generator | None:
        """A CPU generator for random factors: the same numbers on every device. None: the global one."""
        if self.seed is None:
            return None
        mixed = self.seed if self.name is None else self.seed ^ zlib.crc32(self.name.encode())
        return torch.Generator().manual_seed(mixed)


@dataclass(frozen=True)
class Solution:
    """What a method found.

    Attributes:
        factors: Of the correction at scaling 1, or of a trainable start (``Method.corrects``).
        base: The quantised base that the factors were solved for; None: derived by ``initialise``.
        trace: Relative error by iteration, in the method's own objective; the first entry is the plain base.
        best: Index into ``trace`` of the iterate that was kept; 0 is the plain base with no correction.
        error_plain: Relative Frobenius error of plain absmax quantisation, if it was computed on the way.
    """

    factors: LowRankFactors
    base: QuantizedTensor | None = None
    trace: tuple[float, ...] = ()
    best: int = 0
    error_plain: float | None = None


@dataclass(frozen=True)
class Method:
    """One initialisation.

    Attributes:
        name: As in ``init_lora_weights`` or ``LoftQConfig.method``.
        solve: (float32 weight (out, in), request) -> Solution.
        source: Where the mathematics comes from.
        corrects: The factors correct the base, so that base + scaling * B @ A ~= weight, and they are divided
            by the scaling. Otherwise they are a start for training and are stored as they are.
        quantizes: ``solve`` returns the quantised base and needs a spec. A method that corrects and doesn't
            quantise leaves the residual weight - B @ A as the base.
        needs_hessian: ``solve`` needs ``request.hessian``, and its objective is the output error.
        diagonal_hessian: ``solve`` also does with the diagonal of the second moment, (in,).
        variant: Makes the method of a name that begins with this one's, such as pissa_niter_4.
        solve_many: (float32 weights (n, out, in), n requests that differ in their names alone) -> n
            Solutions, each as ``solve`` gives it up to rounding; for GPUs, which one matrix does not fill.
    """

    name: str
    solve: Callable[[Tensor, InitRequest], Solution]
    source: str
    corrects: bool = False
    quantizes: bool = False
    needs_hessian: bool = False
    diagonal_hessian: bool = False
    variant: Callable[[str], Method] | None = None
    solve_many: Callable[[Tensor, Sequence[InitRequest]], list[Solution]] | None = None


def frobenius(X: Tensor) -> float:
    """||X||_F of a matrix; waits for the device. NaN or inf if X holds one."""
    norm = float(torch.linalg.vector_norm(torch.linalg.vector_norm(X, dim=1).double()))
    if (
        not 1e-15 < norm < 1e15
    ):  # float32 squares may have under- or overflowed; the exact way is 20 times slower
        norm = float(torch.linalg.vector_norm(X, dtype=torch.float64))
    return norm


def frobenius_each(X: Tensor) -> Tensor:
    """||X||_F of each matrix (..., out, in), float64 (...) on X's device, whose squares float32 must hold."""
    return torch.linalg.vector_norm(torch.linalg.vector_norm(X, dim=-1).double(), dim=-1)


def relative(part: float, whole: float) -> float:
    """part / whole, and 0 where there is nothing to be relative to."""
    return part / whole if whole > 0 else 0.0
