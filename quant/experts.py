"""A stack of quantised experts in the place of one Parameter (experts, a, b).

The experts modules of transformers 5 index their stacked weights and multiply with what they get:
``F.linear(x, self.gate_up_proj[e])``, or ``x @ self.gate_up_proj[e]`` where matrices are stored (in, out).
Here indexing gives an ``ExpertMatrix``, whose product is that of a QuantLinear: decoded for the product, and
again in backward, so that autograd keeps codes and no dense expert. transformers' "grouped_mm" multiplies
with all experts at once: they are decoded together, into the buffer that all layers share. Anything else that
is asked of the stack gets it dense, which is right and takes a layer's dense experts of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quant.grouped import multiply_groups
from quant.linear import QuantLinear

_LINEAR = (torch.nn.functional.linear,)
_GROUPED = ("_grouped_mm", "grouped_mm_fallback")  # torch's, and transformers' where torch has none
_MATMUL = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


class ExpertMatrix:
    """One expert's matrix, as an operand of a product.

    Args:
        layer: The quantised matrix, (out, in).
        in_out: The Parameter has it as (in, out).
    """

    def __init__(self, layer: QuantLinear, in_out: bool) -> None:
        self.layer = layer
        self.in_out = in_out

    @property
    def shape(self) -> torch.Size:
        """As the Parameter's matrix."""
        return torch.Size(reversed(self.layer.shape)) if self.in_out else self.layer.shape

    @property
    def T(self) -> ExpertMatrix:
        """Transposed."""
        return ExpertMatrix(self.layer, not self.in_out)

    @property
    def mT(self) -> ExpertMatrix:
        """Transposed."""
        return self.T

    def product(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's dtype (under autocast, in autocast's)."""
        y: Tensor = self.layer(x)
        return y

    def weight(self) -> Tensor:
        """Dense, (out, in)."""
        return self.layer.dequantize()

    def dense(self) -> Tensor:
        """Dense, as the Parameter's matrix."""
        return self.weight().mT if self.in_out else self.weight()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Products are the layer's; all else sees the dense matrix."""
        kwargs = kwargs or {}
        if len(args) >= 2 and isinstance(args[1], ExpertMatrix) and isinstance(args[0], Tensor):
            matrix = args[1]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            if func in _LINEAR and not matrix.in_out:
                y = matrix.product(args[0])
                return y if bias is None else y + bias
            if func in _MATMUL and matrix.in_out and not kwargs:
                return matrix.product(args[0])
        return func(*_dense(args), **_dense(kwargs))


class ExpertStack:
    """What stands in for a Parameter (experts, a, b): indexed it gives operands, else it is dense."""

    shape: torch.Size
    in_out: bool  # matrices are (in, out)

    def matrix(self, number: int) -> ExpertMatrix:
        """The operand of one expert."""
        raise NotImplementedError

    def multiply_groups(self, x: Tensor, ends: Tensor) -> Tensor:
        """(rows, in) -> (rows, out), rows sorted by expert; int32 (experts,) where each expert's end."""
        raise NotImplementedError

    @property
    def mT(self) -> ExpertStack:
        """Every matrix transposed."""
        return _Turned(self)

    def data_ptr(self) -> int:
        """Of nothing: a multiple of any alignment."""
        return 0

    def dense(self) -> Tensor:
        """All experts, as the Parameter."""
        return torch.stack([self.matrix(number).dense() for number in range(self.shape[0])])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) or (
            isinstance(index, Tensor) and not index.dim() and not index.is_floating_point()
        ):
            number = int(index)
            if not -len(self) <= number < len(self):
                raise IndexError(f"expert {number} of {len(self)}")
            return self.matrix(number % len(self))
        return self.dense()[index]

    def transpose(self, first: int, second: int) -> Any:
        """Every matrix transposed, or the dense stack with other dimensions exchanged."""
        return self.mT if {first % 3, second % 3} == {1, 2} else self.dense().transpose(first, second)

    def dim(self) -> int:
        """Three."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one entry of it."""
        return self.shape if dim is None else self.shape[dim]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Products of batches go expert by expert, those of groups at once; all else sees the dense stack."""
        if getattr(func, "__name__", "") in _GROUPED and len(args) == 2 and isinstance(args[1], ExpertStack):
            x, stack = args
            options = dict(kwargs or {})
            ends = options.pop("offs", None)
            if stack.in_out and ends is not None and not any(value is not None for value in options.values()):
                return stack.multiply_groups(x, ends)
        if func is torch.bmm and not kwargs and isinstance(args[1], ExpertStack):
            x, stack = args
            if x.shape[0] == len(stack):
                return torch.stack([torch.matmul(x[n], stack[n]) for n in range(len(stack))])
        return func(*_dense(args), **_dense(kwargs or {}))


def _dense(value: Any) -> Any:
    """``value`` with what stands in for tensors made tensors."""
    if isinstance(value, (ExpertMatrix, ExpertStack)):
        return value.dense()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_dense, value))
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items()}
    return value


class QuantExperts(ExpertStack, nn.Module):
    """Quantised experts: a module of QuantLinears named by their numbers, where the Parameter was.

    Args:
        experts: How many.
        in_out: The Parameter's matrices are (in, out); each QuantLinear holds (out, in) all the same.
    """

    def __init__(self, experts: int, in_out: bool) -> None:
        nn.Module.__init__(self)
        self.in_out = in_out
        for number in range(experts):
            self.register_module(str(number), None)

    @property
    def layers(self) -> list[QuantLinear]:
        """The experts in order.

        Raises:
            ValueError: some are not there yet.
        """
        found = list(self._modules.values())
        if any(layer is None for layer in found):
            raise ValueError("some experts of this stack have no weights yet")
        return found  # type: ignore[return-value]

    def multiply_groups(self, x: Tensor, ends: Tensor) -> Tensor:
        return multiply_groups(x, self.layers, ends)

    def __iter__(self) -> Iterator[ExpertMatrix]:
        return (self.matrix(number) for number in range(len(self)))

    def __len__(self) -> int:
        return len(self._modules)

    def matrix(self, number: int) -> ExpertMatrix:
        """The operand of one expert."""
        return ExpertMatrix(self._modules[str(number)], self.in_out)  # type: ignore[arg-type]

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Of the Parameter."""
        return torch.Size((len(self), *self.matrix(0).shape))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that were quantised."""
        return self.layers[0].weight_dtype

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.layers[0].codes.device

    @property
    def requires_grad(self) -> bool:
        """Never: the experts are frozen."""
        return False

    @property
    def data(self) -> Tensor:
        """The dense stack."""
        return self.dense()

    def is_floating_point(self) -> bool:
        """What it stands for is."""
        return True

    def numel(self) -> int:
        """Weights in it."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Bytes of a dense weight."""
        return self.dtype.itemsize

    def extra_repr(self) -> str:
        """How the matrices lie."""
        return f"{len(self)} experts, {'(in, out)' if self.in_out else '(out, in)'}"


def map_matrices(
    stack: ExpertStack,
    make: Callable[[int, ExpertMatrix], ExpertMatrix],
    added: Callable[[Tensor, Tensor], Tensor],
) -> ExpertStack:
    """A stack whose operands are what ``make`` gives for number and operand.

    ``added`` gives what that adds to ``multiply_groups``, for the same arguments.
    """
    return _Mapped(stack, make, added)


class _Turned(ExpertStack):
    """A stack with every matrix transposed."""

    def __init__(self, stack: ExpertStack) -> None:
        self._stack = stack
        self.shape = torch.Size((stack.shape[0], stack.shape[2], stack.shape[1]))
        self.in_out = not stack.in_out
        self.device: Any = getattr(stack, "device", None)
        self.dtype: Any = getattr(stack, "dtype", None)

    @property
    def mT(self) -> ExpertStack:
        return self._stack

    def matrix(self, number: int) -> ExpertMatrix:
        return self._stack.matrix(number).T

    def multiply_groups(self, x: Tensor, ends: Tensor) -> Tensor:
        return self._stack.multiply_groups(x, ends)


class _Mapped(ExpertStack):
    def __init__(
        self,
        stack: ExpertStack,
        make: Callable[[int, ExpertMatrix], ExpertMatrix],
        added: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self._stack, self._make, self._added = stack, make, added
        self.shape, self.in_out = stack.shape, stack.in_out
        self.device: Any = getattr(stack, "device", None)
        self.dtype: Any = getattr(stack, "dtype", None)

    def matrix(self, number: int) -> ExpertMatrix:
        return self._make(number, self._stack.matrix(number))

    def multiply_groups(self, x: Tensor, ends: Tensor) -> Tensor:
        y = self._stack.multiply_groups(x, ends)
        return y + self._added(x, ends).to(y.dtype)
