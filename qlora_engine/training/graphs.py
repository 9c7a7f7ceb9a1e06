"""Decoder layers replayed from CUDA graphs: two launches a layer and step instead of hundreds.

From Python a layer takes the host some ten milliseconds forward and backward, whatever the batch; a fast GPU,
or a small model, waits for it. Here a layer's launches are captured once and replayed. A recomputed layer's
forward graph keeps its input alone, its backward graph computes the layer again; another layer's activations
stay in the graphs' memory from forward to backward. All graphs share one memory pool, so they are captured in
the order of a step: forward from the first layer to the last, backward from the last to the first.

The first training step runs as ever and shows what the layers are called with; at the second one the graphs
are captured. A call of another shape, in eval mode or without gradients runs as ever, too.
"""

from __future__ import annotations

import contextlib
import gc
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from qlora_engine.errors import InputError

from .recompute import decoder_layers

Capture = Callable[[Callable[[], list[Tensor]]], tuple[Callable[[], None], list[Tensor]]]


def enable(model: nn.Module, wanted: str, why_not: str | None = None) -> GraphedLayers | None:
    """Replay the decoder layers of ``model``, see ``GraphedLayers``.

    Args:
        model: Ready for training.
        wanted: "auto", "on" or "off".
        why_not: What the caller knows to speak against it.

    Returns:
        None where it is off, or "auto" and something speaks against it.

    Raises:
        InputError: "on", and something speaks against it.
    """
    if not can_replay(model, wanted, why_not):
        return None
    device = next(model.parameters()).device
    return GraphedLayers(model, lambda: capture_cuda(device))


def can_replay(model: nn.Module, wanted: str, why_not: str | None = None) -> bool:
    """Whether ``enable`` would.

    Raises:
        InputError: "on", and something speaks against it.
    """
    if wanted == "off":
        return False
    reason = why_not or reason_against(model)
    if reason is not None and wanted == "on":
        raise InputError(f"cuda_graphs={wanted!r}: {reason}; allowed here: auto, off")
    return reason is None


def reason_against(model: nn.Module) -> str | None:
    """Why the layers of ``model`` cannot be replayed, or None where they can, as far as is known before."""
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type != "cuda":
        return "CUDA graphs need a CUDA GPU"
    return _structural_reason(model)


def _structural_reason(model: nn.Module) -> str | None:
    layers = decoder_layers(model)
    if not layers:
        return "the model has no decoder layers that transformers could checkpoint"
    for layer in layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Dropout) and module.p > 0:
                return f"dropout in {name} would repeat one mask at every replay"
            if hasattr(module, "experts") or "Experts" in type(module).__name__:
                return "tokens are sent to experts by their number, which a graph cannot do"
    return None


def capture_cuda(device: torch.device) -> Capture:
    """Captures on ``device``, all in one memory pool."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)

    def capture(function: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                out = function()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # a broken capture's end only says that it is broken
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
        return graph.replay, out

    return capture


class GraphedLayers:
    """Replaces the forward of a model's decoder layers; ``disable`` puts it back.

    Args:
        model: In training, adapters attached, ``recompute.apply`` done: which layers are computed twice is
            read from it.
        begin: Begins a set of graphs that share memory: returns what records a function's launches, which
            gives how to repeat them and the tensors that they write.

    Attributes:
        ready: Whether graphs have been captured.
        failure: Why capturing failed; None: it has not. The layers then run as ever.
    """

    def __init__(self, model: nn.Module, begin: Callable[[], Capture]) -> None:
        self.begin = begin
        self.ready = False
        self.failure: str | None = None
        self.layers = [_Layer(module, self) for module in decoder_layers(model)]
        self._sources: list[Tensor | None] = []
        self._statics: list[Tensor] = []

    def note(self) -> str:
        """For people: what became of it."""
        if self.failure is not None:
            return f"CUDA graphs were not used: {self.failure}"
        if not self.ready:
            return "CUDA graphs were not used: no two steps in a row had one shape"
        return f"{len(self.layers)} decoder layers were replayed from CUDA graphs"

    def disable(self) -> None:
        """Let the layers run as before, and free what was captured."""
        self.forget()
        for layer in self.layers:
            layer.restore()
        self.layers = []

    def forget(self) -> None:
        """Drop the graphs; the next training step is recorded anew."""
        self.ready = False
        self._sources, self._statics = [], []
        for layer in self.layers:
            layer.forget()

    def usable(self, layer: _Layer, leaves: list[Any], spec: Any) -> bool:
        """Whether ``layer`` can be replayed on these arguments; records and captures on the way to it."""
        if self.failure is not None:
            return False
        if not self.ready:
            if layer is self.layers[0] and layer.signature is not None:
                if all(other.signature is not None for other in self.layers) and layer.fits(leaves, spec):
                    self._capture_all(leaves)
                else:  # rows of another length: the step after one like this is captured
                    self.forget()
            if not self.ready:
                before = None if layer is self.layers[0] else self.layers[self.layers.index(layer) - 1]
                layer.record(leaves, spec, before)
                return False
        return layer.fits(leaves, spec)

    def _capture_all(self, leaves: list[Any]) -> None:
        device = leaves[0].device
        sources: list[Tensor] = []
        for layer in self.layers:
            layer.places = {}
            for index, leaf in enumerate(layer.leaves):
                if isinstance(leaf, Tensor):
                    known = next((i for i, other in enumerate(sources) if other is leaf), len(sources))
                    if known == len(sources):
                        sources.append(leaf)
                    layer.places[index] = known
        self._statics = [source.detach().clone() for source in sources]
        self._sources = [None] * len(sources)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()  # freeing the last step's tensors is not to be part of a graph
        try:
            with _without_autocast_cache(device.type):
                self.capture = self.begin()
                x = torch.empty_like(leaves[0])
                for layer in self.layers:
                    x = layer.capture_forward(
                        x if layer.chained else torch.empty_like(leaves[0]), self._statics
                    )
                grad = torch.empty_like(x)
                for layer in reversed(self.layers):
                    layer.capture_backward(grad)
        except Exception as error:
            self.forget()
            self.failure = f"the layers cannot be captured: {str(error).splitlines()[0]}"
            return
        finally:
            if collecting:
                gc.enable()
        for layer in self.layers:
            layer.leaves, layer.output = [], None
        self.ready = True

    def load(self, layer: _Layer, leaves: list[Any]) -> None:
        """Copy what the layer is called with, beside its input, to where the graphs read it: once a step."""
        for index, place in layer.places.items():
            if self._sources[place] is not leaves[index]:
                self._statics[place].copy_(leaves[index])
                self._sources[place] = leaves[index]


class _Layer:
    """One decoder layer: its own forward, what it was called with, its graphs."""

    def __init__(self, module: nn.Module, owner: GraphedLayers) -> None:
        self.module, self.owner = module, owner
        self.had_forward = "forward" in module.__dict__
        self.forward: Callable[..., Any] = module.forward
        self.recomputed = bool(module.gradient_checkpointing)
        self.forget()

        def graphed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        module.forward = types.MethodType(graphed, module)
        module.gradient_checkpointing = False  # type: ignore[assignment]

    def restore(self) -> None:
        if self.had_forward:
            self.module.forward = self.forward
        else:
            del self.module.forward
        self.module.gradient_checkpointing = self.recomputed  # type: ignore[assignment]

    def forget(self) -> None:
        self.signature: list[Any] | None = None
        self.spec: Any = None
        self.leaves: list[Any] = []
        self.output: weakref.ref[Tensor] | None = None
        self.chained = False  # its input is the very output of the layer before
        self.places: dict[int, int] = {}
        self.replay_forward: Callable[[], None] | None = None
        self.replay_backward: Callable[[], None] | None = None
        self.pointers: tuple[int, ...] = ()
        self.tape: Tensor | None = None
        self.runs = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.module.training or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        if args and isinstance(args[0], Tensor) and self.trained() and self.owner.usable(self, leaves, spec):
            return self.replay(leaves)
        if self.recomputed:
            output = checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
        else:
            output = self.forward(*args, **kwargs)
        if self.leaves and isinstance(output, Tensor):
            self.output = weakref.ref(output)
        return output

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def record(self, leaves: list[Any], spec: Any, before: _Layer | None) -> None:
        self.signature, self.spec = [_kind(leaf) for leaf in leaves], spec
        self.chained = before is not None and before.output is not None and before.output() is leaves[0]
        self.leaves = [None, *leaves[1:]]  # the input is as large as the rest is small

    def fits(self, leaves: list[Any], spec: Any) -> bool:
        return self.spec == spec and self.signature == [_kind(leaf) for leaf in leaves]

    def capture_forward(self, x: Tensor, statics: list[Tensor]) -> Tensor:
        """Capture the layer on ``x`` and the shared copies of its other arguments; its output."""
        self.x = x
        self.parameters = self.trained()
        # A parameter's node in autograd's graph lives as long as any loss does, on the stream of the step
        # that made it, which no capture may draw in: these share its memory and have nodes of their own.
        self.twins = [nn.Parameter(parameter.detach()) for parameter in self.parameters]
        self.pointers = tuple(parameter.data_ptr() for parameter in self.parameters)
        fixed = [statics[self.places[i]] if i in self.places else leaf for i, leaf in enumerate(self.leaves)]

        def call(x: Tensor) -> Tensor:
            args, kwargs = tree_unflatten([x, *fixed[1:]], self.spec)
            with _swapped(self.module, self.parameters, self.twins):
                y = self.forward(*args, **kwargs)
            if not isinstance(y, Tensor):
                raise TypeError(f"{type(self.module).__name__} returns a {type(y).__name__}, not a tensor")
            return y

        def run() -> list[Tensor]:
            if self.recomputed:
                with torch.no_grad():
                    return [call(x)]
            self.leaf = x.detach().requires_grad_()
            with torch.enable_grad():
                self.tape = call(self.leaf)
            return [self.tape.detach()]

        self.call = call
        self.replay_forward, (self.y,) = self.owner.capture(run)
        return self.y

    def capture_backward(self, grad: Tensor) -> None:
        """Capture backward: ``grad`` holds the output's gradient before, the input's after."""
        self.grad = grad

        def run() -> list[Tensor]:
            if self.recomputed:
                self.leaf = self.x.detach().requires_grad_()
                with torch.enable_grad():
                    self.tape = self.call(self.leaf)
            tape, self.tape = self.tape, None
            assert tape is not None
            wanted = [self.leaf, *self.twins]
            dx, *grads = torch.autograd.grad(tape, wanted, grad, allow_unused=True)
            grad.copy_(dx)
            self.reached = [parameter for parameter, g in zip(self.parameters, grads) if g is not None]
            return [g for g in grads if g is not None]

        self.replay_backward, self.grads = self.owner.capture(run)

    def replay(self, leaves: list[Any]) -> Tensor:
        if self.pointers != tuple(parameter.data_ptr() for parameter in self.parameters):
            raise RuntimeError(
                "a trained parameter has moved since its layer's launches were captured; call forget() first"
            )
        self.owner.load(self, leaves)
        x = leaves[0]
        y: Tensor = _Replay.apply(x, self.parameters[0], self)
        return y

    def add_gradients(self) -> None:
        """Add what backward wrote to the parameters' gradients, as autograd would."""
        empty = [parameter.grad is None for parameter in self.reached]
        if all(empty):
            for parameter, gradient in zip(self.reached, torch._foreach_mul(self.grads, 1.0)):
                parameter.grad = gradient
            return
        for parameter, gradient in zip(self.reached, self.grads):
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad += gradient


class _Replay(torch.autograd.Function):
    """The graphs of a layer in autograd's; gradients of parameters are added beside it, all at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trained: Tensor, layer: _Layer) -> Tensor:
        if x.data_ptr() != layer.x.data_ptr():
            layer.x.copy_(x)
        assert layer.replay_forward is not None
        layer.replay_forward()
        layer.runs += 1
        ctx.layer, ctx.run = layer, layer.runs
        return layer.y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        layer: _Layer = ctx.layer
        if ctx.run != layer.runs or layer.replay_backward is None:
            raise RuntimeError("a layer replayed from CUDA graphs ran forward again before its backward")
        layer.grad.copy_(grads[0])
        layer.replay_backward()
        layer.add_gradients()
        return layer.grad.clone() if ctx.needs_input_grad[0] else None, None, None


@contextlib.contextmanager
def _swapped(module: nn.Module, old: list[nn.Parameter], new: list[nn.Parameter]) -> Iterator[None]:
    """``module`` with other parameters in the place of its own."""
    twins = {id(parameter): twin for parameter, twin in zip(old, new)}
    places = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and id(parameter) in twins
    ]
    try:
        for owner, name, parameter in places:
            owner._parameters[name] = twins[id(parameter)]
        yield
    finally:
        for owner, name, parameter in places:
            owner._parameters[name] = parameter


def _kind(leaf: Any) -> Any:
    """What has to be equal for a graph to be right."""
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.dtype, leaf.device)
    return leaf


@contextlib.contextmanager
def _without_autocast_cache(kind: str) -> Iterator[None]:
    """Weights that autocast casts and keeps would lie in one graph's memory and be read by others."""
    if not torch.is_autocast_enabled(kind):
        yield
        return
    with torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False):
        yield
