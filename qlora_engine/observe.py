"""Watch the inputs of chosen layers while a model runs, and accumulate their second moments.

Layers that are fed the same tensor (query, key and value; gate and up) share one accumulator. That is found
from the identity of the tensors, not from names, and undone if layers that began alike are fed apart later.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qlora_engine.errors import InputError
from qlora_engine.hessian import CrossMoment, SecondMoment

_EXPERT_PRODUCTS = (
    nn.functional.linear,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    Tensor.bmm,
)


@dataclass(frozen=True)
class Target:
    """A layer to watch.

    Attributes:
        name: Path of the module; of an expert stacked with others, the parameter's path and its index.
        kind: "linear", "conv1d", "embedding" or "expert".
        module: The module itself; for an expert the module that holds the parameter.
        parameter: Name of the fused parameter in ``module``; None unless ``kind`` is "expert".
        index: The expert's row of the fused parameter.
    """

    name: str
    kind: str
    module: nn.Module
    parameter: str | None = None
    index: int = 0

    @property
    def weight(self) -> Tensor | None:
        """The dense weight as it is stored (an expert's slice), or None where the layer has none."""
        stored = getattr(self.module, self.parameter or "weight", None)
        if not isinstance(stored, Tensor):
            return None
        return stored[self.index] if self.kind == "expert" else stored


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version  # torch keeps no count of changes in inference mode


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Embedding) or hasattr(module, "num_embeddings"):
        return "embedding"
    if isinstance(getattr(module, "in_features", None), int):
        return "linear"
    # transformers' Conv1D keeps nx inputs and nf outputs; its weight is (in, out).
    return "conv1d" if type(module).__name__ == "Conv1D" else None


def _fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, int]]:
    """(parameter path, holder, parameter name, experts) of every parameter that stacks experts' weights."""
    for path, module in model.named_modules():
        if "Experts" in type(module).__name__:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    yield f"{path}.{name}" if path else name, module, name, parameter.shape[0]


def find_targets(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Target]:
    """Layers to watch, by name.

    Args:
        model: Where to look.
        names: Module paths; of experts that are stacked in one parameter the parameter's path (all of them)
            or that and an index. None: every linear layer and expert but the output head and embeddings.

    Raises:
        InputError: a path that does not exist, or a layer of a kind whose inputs are not rows of features.
    """
    modules = dict(model.named_modules())
    experts: dict[str, dict[str, Target]] = {
        path: {f"{path}.{i}": Target(f"{path}.{i}", "expert", holder, name, i) for i in range(count)}
        for path, holder, name, count in _fused_experts(model)
    }
    single = {name: target for fused in experts.values() for name, target in fused.items()}
    if names is None:
        find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = find_head()
        layers = {
            path: Target(path, kind, module)
            for path, module in modules.items()
            if module is not head and (kind := _kind(module)) in ("linear", "conv1d")
        }
        return {**layers, **single}
    found: dict[str, Target] = {}
    for name in names:
        if name in experts:
            found.update(experts[name])
        elif name in single:
            found[name] = single[name]
        elif name not in modules:
            raise InputError(f"no module {name!r} in this {type(model).__name__}")
        elif (kind := _kind(modules[name])) is None:
            raise InputError(
                f"{name} is a {type(modules[name]).__name__}; inputs are collected for Linear, Conv1D, "
                "Embedding and stacked experts"
            )
        else:
            found[name] = Target(name, kind, modules[name])
    return found


@dataclass
class Group:
    """Layers that have seen the same inputs so far, and the moment of those inputs.

    Attributes:
        moment: What the members' inputs add up to.
        cross: The same beside the inputs on a tape, E[y x^T], if there is a tape.
        events: Inputs counted.
        seen: How many of them each member has been fed: all, or all but the last.
    """

    moment: SecondMoment
    cross: CrossMoment | None = None
    events: int = 0
    seen: dict[str, int] = field(default_factory=dict)
    _last: weakref.ref[Tensor] | None = None
    _version: int = 0
    _held: tuple[Tensor, Tensor | None] | None = None  # kept while a member has not seen it

    def is_last(self, x: Tensor) -> bool:
        """Whether ``x`` is the tensor counted last, unchanged since."""
        return self._last is not None and self._last() is x and self._version == _version(x)

    def count(self, x: Tensor, partner: Tensor | None) -> None:
        """Add an input, and the original that it drifted from."""
        if x.is_floating_point():
            self.moment.add(x)
        else:
            self.moment.add_ids(x)
        if partner is not None and partner.shape != x.shape:
            self.cross = None  # routed differently: no row has its partner
        if self.cross is not None and partner is not None:
            self.cross.add(x, partner)
        self.events += 1
        self._last, self._version = weakref.ref(x), _version(x)
        self._held = (x, partner) if len(self.seen) > 1 else None

    def saw(self, name: str) -> None:
        """``name`` was fed the input counted last."""
        self.seen[name] = self.events
        if all(events == self.events for events in self.seen.values()):
            self._held = None

    def split(self, names: Iterable[str]) -> Group:
        """Take members out that have not seen the last input; their new group has not counted it."""
        if self._held is None:
            raise AssertionError("members lag behind an input that was not kept")
        x, partner = self._held
        if self._version != _version(x):
            raise RuntimeError(
                f"the input of {', '.join(self.seen)} changed in place; observe with share=False"
            )
        other = Group(self.moment.copy(), None, self.events - 1)
        other.moment.add(x, sign=-1)
        if self.cross is not None:
            other.cross = self.cross.copy()
            if partner is not None:
                other.cross.add(x, partner, sign=-1)
        for name in names:
            other.seen[name] = self.seen.pop(name)
        if all(events == self.events for events in self.seen.values()):
            self._held = None
        return other


class Observer:
    """Context manager: while it is entered, inputs of the targets are counted.

    Args:
        targets: From ``find_targets``. Experts stacked in one parameter are seen only while their module runs
            expert by expert ("eager" in transformers) or as one batched product.
        max_full_width: Inputs wider than this keep only the diagonal of H. None: all are kept whole.
        share: Let layers with the same input share an accumulator.
        device: Where the sums live; None is where the inputs are.
        tape: Inputs by layer as ``record_tape`` left them, for the moment between them and what is seen now.
        record_tape: Keep a copy of the inputs by layer in ``self.tape`` until ``start`` is called again.

    Attributes:
        active: Set to False to let the model run unseen.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        *,
        max_full_width: int | None = None,
        share: bool = True,
        device: torch.device | str | None = None,
        tape: Mapping[str, list[Tensor]] | None = None,
        record_tape: bool = False,
    ) -> None:
        self.targets = dict(targets)
        self.active = True
        self.groups: dict[str, Group] = {}
        self.tape: dict[str, list[Tensor]] = defaultdict(list)
        self._max_full_width = max_full_width
        self._share = share
        self._device = device
        self._original = tape
        self._record = record_tape
        self._recent: dict[int, tuple[weakref.ref[Tensor], Group, Tensor | None]] = {}
        self._calls: dict[str, int] = defaultdict(int)
        self._entered = ExitStack()

    def __enter__(self) -> Observer:
        stack = ExitStack()
        for target in self.targets.values():
            if target.kind != "expert":
                hook = target.module.register_forward_pre_hook(self._hook(target), with_kwargs=True)
                stack.callback(hook.remove)
        experts = ExpertProducts(self.targets.values(), self._see_expert)
        if experts:
            stack.enter_context(experts)
        self._entered = stack
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    def start(self) -> None:
        """A new batch begins: the first call of each layer is again number 0 on the tape."""
        self.tape.clear()
        self._calls.clear()
        self._recent.clear()

    def finish(self) -> dict[str, Group]:
        """Groups by layer name, of the layers that were fed anything; two names may give the same group.

        Raises:
            InputError: inputs that are not finite.
        """
        for group in {id(group): group for group in self.groups.values()}.values():
            self._part_laggards(group)
        for name, group in self.groups.items():
            if not bool(torch.isfinite(group.moment.sum).all()):
                raise InputError(
                    f"the inputs of {name} are not finite; run the model in float32 or bfloat16, not float16"
                )
        return self.groups

    def _hook(self, target: Target) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.active:
                x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
                if x is None:
                    raise InputError(f"{target.name} was called without a tensor")
                self.see(target, x)

        return see

    def _see_expert(self, target: Target, x: Tensor, _: Tensor) -> None:
        if self.active:
            self.see(target, x)

    def see(self, target: Target, x: Tensor) -> None:
        """``target`` is being fed ``x``, (..., in), or ids of any shape for an embedding."""
        name = target.name
        call = self._calls[name]
        self._calls[name] += 1
        partner = None
        if self._original is not None:
            tape = self._original.get(name, [])
            partner = tape[call] if call < len(tape) else x.new_empty(0)
        group = self.groups.get(name)
        if group is None:
            group = self._shared_with(x)
            if group is None:
                group = self._new_group(target, x)
                group.seen[name] = 0
                self._count(group, x, partner)
        elif group.seen[name] == group.events:
            self._part_laggards(group)
            self._count(group, x, partner)
        elif not group.is_last(x):
            group = group.split([name])
            self._count(group, x, partner)
        group.saw(name)
        self.groups[name] = group
        if self._record:
            self.tape[name].append(self._copy(x))

    def _new_group(self, target: Target, x: Tensor) -> Group:
        if x.is_floating_point():
            width, diagonal = x.shape[-1], False
            if self._max_full_width is not None:
                diagonal = width > self._max_full_width
        else:
            width, diagonal = int(getattr(target.module, "num_embeddings", 0)), True
            if not width:
                raise InputError(f"{target.name} is fed {x.dtype}, but has no num_embeddings")
        device = self._device if self._device is not None else x.device
        cross = None if self._original is None or diagonal else CrossMoment(width, device=device)
        return Group(SecondMoment(width, diagonal=diagonal, device=device), cross)

    def _shared_with(self, x: Tensor) -> Group | None:
        """The group that began with this very tensor and has counted nothing else."""
        if not self._share or not x.is_floating_point() or id(x) not in self._recent:
            return None
        reference, group, _ = self._recent[id(x)]
        return group if reference() is x and group.events == 1 and group.is_last(x) else None

    def _count(self, group: Group, x: Tensor, partner: Tensor | None) -> None:
        group.count(x, partner)
        copy = x.detach().clone() if self._record else None
        self._recent[id(x)] = (weakref.ref(x), group, copy)

    def _copy(self, x: Tensor) -> Tensor:
        """A copy of ``x`` for the tape, the same one for all layers that share it."""
        entry = self._recent.get(id(x))
        if entry is not None and entry[0]() is x and entry[2] is not None:
            return entry[2]
        return x.detach().clone()

    def _part_laggards(self, group: Group) -> None:
        behind = [name for name, seen in group.seen.items() if seen < group.events]
        if behind:
            other = group.split(behind)
            for name in behind:
                self.groups[name] = other


class ExpertProducts(TorchFunctionMode):
    """Context manager that sees the products with slices of stacked experts, which no module's hook could.

    Args:
        targets: Those that are not experts, or whose weights are not loaded, are left out.
        see: Called with a target, the inputs (n, in) that were routed to it and their outputs (n, out).
    """

    def __init__(self, targets: Iterable[Target], see: Callable[[Target, Tensor, Tensor], None]) -> None:
        super().__init__()
        self._see = see
        self._experts: dict[int, tuple[Target, torch.Size]] = {}
        for target in targets:
            weight = target.weight
            if target.kind == "expert" and weight is not None and not weight.is_meta:
                self._experts[weight.data_ptr()] = (target, weight.shape)

    def __bool__(self) -> bool:
        return bool(self._experts)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _EXPERT_PRODUCTS and not kwargs and len(args) >= 2:
            self._look(args[0], args[1], output)
        return output

    def _look(self, x: Tensor, weight: Tensor, output: Tensor) -> None:
        if weight.is_meta or weight.data_ptr() not in self._experts:
            return
        target, shape = self._experts[weight.data_ptr()]
        if weight.ndim == 2 and set(weight.shape) == set(shape):
            self._see(target, x, output)
        elif weight.ndim == 3 and x.ndim == 3 and weight.shape[1:] == shape:
            # One batched product over all experts (Llama 4); tokens that are not routed to one are zero rows.
            for inputs, slice_, outputs in zip(x, weight, output):
                if slice_.data_ptr() in self._experts:
                    routed = inputs.any(-1)
                    self._see(self._experts[slice_.data_ptr()][0], inputs[routed], outputs[routed])
