"""RMSNorm and the rotary embedding of a decoder layer as one kernel each, forward and backward.

transformers' RMSNorm is six elementwise kernels forward and a dozen backward, and keeps float32 copies of
its input; here the input, which lives anyway, and one number a row are kept. The rotary embedding keeps
nothing but its angles.

A module is recognised by what it computes, tried on random numbers, not by its name. Where a call does not
fit (a CPU, a weight that trains, torch.compile), the model's own code runs.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import fused

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EPS = ("variance_epsilon", "eps", "epsilon")  # attributes under which norms keep what they add
_ROTARY = "apply_rotary_pos_emb"  # what transformers' attentions call the function
_MOST_COLUMNS = 16384  # of a row, which the kernel holds in registers


def enable(model: nn.Module) -> int:
    """Switch RMSNorms with frozen weights and rotary embeddings; returns how many modules were switched.

    Idempotent; ``disable`` undoes it. The classes and their source modules are not touched: other models go
    on as before.
    """
    switched = 0
    kinds: dict[Any, Norm | None] = {}
    functions: dict[Any, Callable[..., Any] | None] = {}
    for module in model.modules():
        if "forward" in module.__dict__:
            continue
        if _may_be_norm(module):
            key = (type(module), module.weight.shape, *(getattr(module, name, None) for name in _EPS))
            if key not in kinds:
                kinds[key] = recognise(module)
            norm = kinds[key]
            if norm is not None:
                module._fused_norm = norm  # type: ignore[assignment]
                module.forward = types.MethodType(_norm_forward, module)
                switched += 1
            continue
        if type(module) not in functions:
            functions[type(module)] = _with_fused_rotary(type(module).forward)
        function = functions[type(module)]
        if function is not None:
            module.forward = types.MethodType(function, module)
            switched += 1
    return switched


def disable(model: nn.Module) -> int:
    """Undo ``enable``; returns how many modules were switched back."""
    switched = 0
    for module in model.modules():
        function = getattr(module.__dict__.get("forward"), "__func__", None)
        if function is _norm_forward:
            del module._fused_norm
        elif not hasattr(function, "_fused_rotary"):
            continue
        del module.forward
        switched += 1
    return switched


# ---- RMSNorm


class Norm(NamedTuple):
    """What a module computes: ``x / sqrt(mean(x^2) + eps)`` in float32, times its weight or 1 + it.

    ``early``: the product with the weight takes what has been rounded to the input's dtype, and has the wider
    dtype of the two; else it is in float32 and rounded at the end. ``mixed``: so it is, too, where input and
    weight differ in dtype.
    """

    eps: float
    one_plus: bool
    early: bool
    mixed: bool = True

    def reference(self, x: Tensor, weight: Tensor) -> Tensor:
        """By PyTorch's operators."""
        wide = x.to(torch.float32)
        n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.early:
            return weight * n.to(x.dtype)
        w = weight.to(torch.float32)
        return (n * (w + 1.0 if self.one_plus else w)).to(x.dtype)

    def out_dtype(self, x: Tensor, weight: Tensor) -> torch.dtype:
        """Of the result."""
        return torch.promote_types(x.dtype, weight.dtype) if self.early else x.dtype


def _may_be_norm(module: nn.Module) -> bool:
    parameters = module._parameters
    return (
        list(parameters) == ["weight"]
        and parameters["weight"] is not None
        and parameters["weight"].dim() == 1
        and 0 < parameters["weight"].shape[0] <= _MOST_COLUMNS
        and not module._modules
        and not module._buffers
    )


@torch.no_grad()
def recognise(module: nn.Module) -> Norm | None:
    """The Norm that ``module`` computes, or None where it is none; tried on random numbers on the CPU.

    Args:
        module: With one vector as its weight. A shallow copy of it runs, with another weight: its own may be
            sharded, on the meta device, or all ones, which says nothing.
    """
    weight = cast(Tensor, module.weight)
    columns = weight.shape[0]
    generator = torch.Generator().manual_seed(columns)
    weight = torch.rand(columns, generator=generator, device="cpu") + 0.25
    x = torch.randn(4, columns, generator=generator, device="cpu")
    for row, size in zip(x, (1.0, 30.0, 1e-3, 1e-4)):
        row *= size  # eps is nothing in some, much in others
    twin = copy.copy(module)
    twin.__dict__.update(_forward_hooks={}, _forward_pre_hooks={})
    wide, half = torch.float32, torch.bfloat16

    def run(x_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
        twin.__dict__["_parameters"] = {"weight": nn.Parameter(weight.to(dtype), requires_grad=False)}
        found = type(module).forward(twin, x.to(x_dtype))
        if not isinstance(found, Tensor) or found.shape != x.shape:
            raise TypeError("no norm")
        return found

    try:
        with torch.autocast("cpu", enabled=False):
            found = {pair: run(*pair) for pair in itertools.product((wide, half), repeat=2)}
    except Exception:  # whatever this module is, it is called otherwise
        return None

    def wrong(norm: Norm, pair: tuple[torch.dtype, torch.dtype]) -> float:
        """The share of elements that differ at all; infinite where they, or the dtypes, differ by much."""
        mine = norm.reference(x.to(pair[0]), weight.to(pair[1]))
        within = 1e-5 if mine.dtype == wide else 2e-2
        if mine.dtype != found[pair].dtype or not torch.allclose(mine, found[pair], rtol=within, atol=0.0):
            return math.inf
        return float((mine != found[pair]).double().mean())

    fitting: list[tuple[float, Norm]] = []
    values = {float(e) for e in (getattr(module, n, None) for n in _EPS) if isinstance(e, (int, float))}
    for eps in values:
        for norm in (Norm(eps, False, True), Norm(eps, False, False), Norm(eps, True, False)):
            if wrong(norm, (wide, wide)) < math.inf and wrong(norm, (half, half)) < math.inf:
                # a float32 result tells to its last bits whether something was rounded on the way
                mixed = all(wrong(norm, pair) < math.inf for pair in ((wide, half), (half, wide)))
                fitting.append((wrong(norm, (half, half)), norm._replace(mixed=mixed)))
    return min(fitting)[1] if fitting else None


def _norm_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    norm, weight = self._fused_norm, self.weight
    if args or kwargs or not _norm_applies(norm, x, weight):
        return type(self).forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
    return rms_norm(x, weight, norm)


def _norm_applies(norm: Norm, x: Tensor, weight: Tensor) -> bool:
    return (
        fused.wanted(x)
        and type(weight) in (Tensor, nn.Parameter)  # put together, where it is sharded
        and x.dtype in _DTYPES
        and weight.dtype in _DTYPES
        and (norm.mixed or x.dtype == weight.dtype)
        and x.dim() > 0
        and x.shape[-1:] == weight.shape
        and x.device == weight.device
        and not (weight.requires_grad and torch.is_grad_enabled())
    )


def rms_norm(x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
    """``norm`` of the last dimension of x, with a gradient of x and none of the weight.

    Args:
        x: (..., columns), float32, float16 or bfloat16.
        weight: (columns,), any of these dtypes.
        norm: Which.

    Returns:
        As ``norm.reference``. x and float32 (rows,) are kept for backward.
    """
    y: Tensor = _RmsNorm.apply(x, weight.detach(), norm)
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
        from quant.backends import triton_norms

        rows = _rows(x)
        weight = weight.contiguous()
        out = torch.empty(x.shape, dtype=norm.out_dtype(x, weight), device=x.device)
        rstd = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
        triton_norms.rms_norm(
            rows,
            weight,
            norm.eps,
            one_plus=norm.one_plus,
            early=norm.early,
            out=out.view(rows.shape),
            rstd=rstd,
        )
        ctx.save_for_backward(x, weight, rstd)
        ctx.norm = norm
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        from quant.backends import triton_norms

        x, weight, rstd = ctx.saved_tensors
        rows = _rows(x)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        triton_norms.rms_norm_backward(
            _rows(grads[0]),
            rows,
            weight,
            rstd,
            one_plus=ctx.norm.one_plus,
            early=ctx.norm.early,
            out=dx.view(rows.shape),
        )
        return dx, None, None


def _rows(x: Tensor) -> Tensor:
    """(rows, columns), columns contiguous; a copy only where it must be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


# ---- the rotary embedding


def _with_fused_rotary(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """``forward`` with the fused function in the place of the rotary embedding that it calls by name.

    Returns:
        The same code with globals of its own, so that nobody else sees the change; None where it calls no
        such function, or one that computes something else.
    """
    if hasattr(forward, "__wrapped__"):
        return _wrapped_again(forward)
    code: Any = getattr(forward, "__code__", None)
    known = getattr(forward, "__globals__", {})
    original = known.get(_ROTARY)
    if not isinstance(forward, types.FunctionType) or _ROTARY not in code.co_names:
        return None
    if original is None or not _is_rotary(original):
        return None
    replaced = {**known, _ROTARY: functools.partial(_rotary, original)}
    replaced.pop("__name__", None)  # torch.compile would look names up in the module that is called so
    twin = types.FunctionType(code, replaced, forward.__name__, forward.__defaults__, forward.__closure__)
    functools.update_wrapper(twin, forward)
    twin.__kwdefaults__ = forward.__kwdefaults__
    twin._fused_rotary = True  # type: ignore[attr-defined]
    return twin


def _wrapped_again(decorated: Any) -> Callable[..., Any] | None:
    """``_with_fused_rotary`` of a decorated function, whose decorator keeps what it calls in its closure."""
    inner = decorated.__wrapped__
    cells = (decorated.__closure__ or ()) if isinstance(decorated, types.FunctionType) else ()
    holds = [cell == types.CellType(inner) for cell in cells]
    function = _with_fused_rotary(inner)
    if function is None or not any(holds):
        return None
    closure = tuple(types.CellType(function) if held else cell for held, cell in zip(holds, cells))
    twin = types.FunctionType(
        decorated.__code__, decorated.__globals__, decorated.__name__, decorated.__defaults__, closure
    )
    functools.update_wrapper(twin, function)  # _fused_rotary, too
    twin.__kwdefaults__ = decorated.__kwdefaults__
    return twin


@torch.no_grad()
def _is_rotary(function: Any) -> bool:
    """Whether ``function(q, k, cos, sin)`` rotates pairs half a head apart; tried on random numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8))
    tensors = [torch.randn(*shape, generator=generator, device="cpu") for shape in shapes]
    wide, half = torch.float32, torch.bfloat16
    try:
        for first, second in ((wide, wide), (half, half), (half, wide), (wide, half)):
            q, k, cos, sin = (t.to(first if i < 2 else second) for i, t in enumerate(tensors))
            found = function(q, k, cos, sin)
            if len(found) != 2:
                return False
            for got, x in zip(found, (q, k), strict=True):
                want = _rotated(x, cos, sin)
                within = 1e-5 if want.dtype == wide else 1e-2
                if got.dtype != want.dtype or not torch.allclose(got, want, rtol=within, atol=within):
                    return False
    except Exception:  # another signature
        return False
    return True


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos[:, None] + turned * sin[:, None]


def _rotary(
    original: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
) -> Any:
    if args or kwargs or not _rotary_applies(q, k, cos, sin):
        return original(q, k, cos, sin, *args, **kwargs)
    return rotary(q, k, cos, sin)


def _rotary_applies(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if not all(isinstance(t, Tensor) for t in (q, k, cos, sin)) or not fused.wanted(q):
        return False
    size = q.shape[-1]
    return (
        q.dim() == k.dim() == 4
        and all(t.dtype in _DTYPES and t.device == q.device for t in (q, k, cos, sin))
        and k.dtype == q.dtype
        and sin.dtype == cos.dtype
        and size % 2 == 0
        and q.shape[1] <= 256
        and (k.shape[0], *k.shape[2:]) == (q.shape[0], *q.shape[2:])
        and all(t.dim() == 3 and t.shape[1:] == q.shape[2:] for t in (cos, sin))
        and all(t.shape[0] in (1, q.shape[0]) for t in (cos, sin))
        and not (cos.requires_grad or sin.requires_grad)
    )


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``x cos + rotate_half(x) sin`` of q and k.

    Args:
        q: (batch, heads, length, size).
        k: (batch, k_heads, length, size), q's dtype.
        cos: (batch or 1, length, size); no gradient.
        sin: (batch or 1, length, size); no gradient.

    Returns:
        q's and k's, in the wider dtype of theirs and cos's. cos and sin are kept for backward.
    """
    rotated: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos, sin)
    return rotated


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = _last_contiguous(cos), _last_contiguous(sin)
        ctx.save_for_backward(cos, sin)
        ctx.dtype = q.dtype
        return _turn(q, k, cos, sin, torch.promote_types(q.dtype, cos.dtype), backward=False)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return (*_turn(grads[0], grads[1], cos, sin, ctx.dtype, backward=True), None, None)


def _turn(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, *, backward: bool
) -> tuple[Tensor, Tensor]:
    from quant.backends import triton_norms

    q, k = _last_contiguous(q), _last_contiguous(k)
    # in the memory order of q, which is that of its projection, and which attention's kernels take
    q_out, k_out = (_last_contiguous(torch.empty_like(t, dtype=dtype)) for t in (q, k))
    triton_norms.rotary(q, k, cos, sin, q_out, k_out, backward=backward)
    return q_out, k_out


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
