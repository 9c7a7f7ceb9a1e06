"""DoRA: a trained magnitude for every output row, and the norm of the adapted weight that it is divided by.

    y = m / ||W + s B A|| * (W x + s B A x)        (norms by output row, held constant in the gradient)

The norm comes from the factors: ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>, row by
row, so the weight is read once in tiles and nothing of the size of W, or of in_features squared, is ever
made.

Source: Liu et al. 2024, arXiv:2402.09353, section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quant.linear import QuantizedModule

from .base_weight import dense_weight

# Elements of the weight that are in float32 at a time.
_TILE_ELEMENTS = 1 << 22


class DoraLinearLayer(nn.Module):
    """The magnitude of one adapter, ``weight``: (out,), or (1, out, 1, ...) for convolutions."""

    def __init__(self, magnitude: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(magnitude)
        self._norm: Tensor | None = None
        self._norm_key: tuple[Any, ...] = ()
        # What PEFT's DoraCaching is seen to fill; the norm above is kept and checked without it, too.
        self._dora_cache: dict[str, Tensor] = {}

    def cached_norm(self, key: tuple[Any, ...]) -> Tensor | None:
        """The norm kept for ``key``, if that is what is kept."""
        norm = self._norm if self._norm_key == key else None
        self._show(norm)
        return norm

    def keep_norm(self, key: tuple[Any, ...], norm: Tensor) -> None:
        """Keep ``norm`` until another key or ``train()``."""
        self._norm, self._norm_key = norm, key
        self._show(norm)

    def _show(self, norm: Tensor | None) -> None:
        self._dora_cache.clear()
        if norm is not None and _caching:
            self._dora_cache["weight-norm"] = norm

    def train(self, mode: bool = True) -> DoraLinearLayer:
        """As nn.Module; training forgets the kept norm."""
        if mode:
            self._norm, self._norm_key = None, ()
            self._dora_cache.clear()
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_norm": None, "_norm_key": (), "_dora_cache": {}}

    def _get_name(self) -> str:
        return "lora.dora." + type(self).__name__


class DoraEmbeddingLayer(DoraLinearLayer):
    """The magnitude of an embedding's adapter, one a column of the table."""


class DoraConvNdLayer(DoraLinearLayer):
    """The magnitude of a convolution's adapter, (1, out, 1, ...)."""


def _tiles(module: nn.Module, transposed: bool) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, float32 rows start...stop) of the stored weight flattened to two dimensions."""
    weight = None if isinstance(module, QuantizedModule) else dense_weight(module).flatten(1)
    rows, columns = module.shape if isinstance(module, QuantizedModule) else weight.shape  # type: ignore[union-attr,misc]
    step = max(1, _TILE_ELEMENTS // max(int(columns), 1))
    q = module.quantized() if isinstance(module, QuantizedModule) else None
    for start in range(0, int(rows), step):
        stop = min(start + step, int(rows))
        if q is not None:
            yield start, stop, q.dequantize_rows(start, stop, torch.float32)
        else:
            yield start, stop, weight[start:stop].float()  # type: ignore[index]


@torch.no_grad()
def adapted_norm(module: nn.Module, A: Tensor, B: Tensor, scaling: float, *, transposed: bool) -> Tensor:
    """Row norms of ``W + scaling B A``, float32 (out,).

    Args:
        module: Holds W, stored (out, in, ...), or (in, out) where ``transposed``.
        A: (r, in), flattened over a kernel.
        B: (out, r).
        scaling: Multiplies the product.
        transposed: W is stored (in, out): Conv1D and embeddings.
    """
    A, B = A.float(), B.float()
    squares = torch.zeros(B.shape[0], device=B.device)  # (out,)
    cross = torch.zeros(B.shape[0], device=B.device)  # (out,)
    for start, stop, tile in _tiles(module, transposed):
        tile = tile.to(B.device)
        if transposed:
            squares += tile.square().sum(0)
            cross += (tile.t() @ A[:, start:stop].t() * B).sum(1)
        else:
            squares[start:stop] = tile.square().sum(1)
            cross[start:stop] = (tile @ A.t() * B[start:stop]).sum(1)
    gram = A @ A.t()  # (r, r)
    squares += 2 * scaling * cross + scaling**2 * (B @ gram * B).sum(1)
    return squares.clamp_(min=0).sqrt_()


_caching: bool | None = None  # None: as True, without showing it


class DoraCaching:
    """Keep the norms between evaluation forwards, or don't: within a ``with`` block, or from a call on.

    Without it they are kept, too, and checked: a norm is computed anew as soon as a factor, the scaling or
    the base weight is another tensor or was changed in place. ``DoraCaching(False)`` keeps none.

    Args:
        enabled: Within the block.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._before: list[bool | None] = []

    def __enter__(self) -> None:
        global _caching
        self._before.append(_caching)
        _caching = self.enabled

    def __exit__(self, *args: object) -> None:
        global _caching
        _caching = self._before.pop()

    def __call__(self, enabled: bool = True) -> None:
        """From now on keep them, or (False) do as if nothing had been said."""
        global _caching
        _caching = True if enabled else None


def caching() -> bool:
    """Whether evaluation may reuse a norm."""
    return _caching is not False and not torch.compiler.is_compiling()
