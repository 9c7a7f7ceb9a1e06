"""How a model calls its blocks: recorded in a pass in which each block hands its input on unchanged.

That a block gets the previous one's output, and that nothing else depends on that output, is not assumed. The
recording refuses a model that does anything to the hidden state between two blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_engine.blocks import Blocks, NotSequential
from qlora_engine.observe import Observer

_HIDDEN = object()  # where the hidden state goes in a recorded call


@dataclass
class BlockCall:
    """Arguments of a block, the hidden state left open."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        args = [hidden if value is _HIDDEN else value for value in self.args]
        kwargs = {name: hidden if value is _HIDDEN else value for name, value in self.kwargs.items()}
        output = block(*args, **kwargs)
        return output[0] if isinstance(output, (tuple, list)) else output


class _Stop(Exception):
    """Ends a forward pass once the last block was reached."""


class CallRecorder:
    """Patches the blocks so that each hands its input on; records how the model calls them."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._known: dict[tuple[int, ...], list[BlockCall]] = {}
        self._rest: tuple[Any, ...] | None = None  # what the first block returns beside the hidden state
        self._form: type | None = None
        self._calls: list[BlockCall] = []
        self._hidden: Tensor | None = None
        self._version = 0
        self._start: Tensor | None = None
        self._observer: Observer | None = None

    @contextmanager
    def _patched(self, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
        before = [layer.__dict__.get("forward") for layer in self._blocks.layers]
        try:
            for layer, forward in zip(self._blocks.layers, forwards):
                layer.__dict__["forward"] = forward
            yield
        finally:
            for layer, own in zip(self._blocks.layers, before):
                del layer.__dict__["forward"]
                if own is not None:
                    layer.__dict__["forward"] = own

    def capture(self, ids: Tensor, observer: Observer) -> tuple[Tensor, list[BlockCall]]:
        """Input of the first block for these ids, and the call of every block.

        The first time, the first block is really run, to learn whether it returns a tensor or a tuple.
        """
        self._calls, self._hidden, self._start = [], None, None
        self._observer = observer
        observer.start()
        observer.active = True
        originals = [layer.forward for layer in self._blocks.layers]
        forwards = [self._record(i, originals[i]) for i in range(len(self._blocks))]
        with self._patched(forwards):
            try:
                self._blocks.model(input_ids=ids.to(self._blocks.device))
            except _Stop:
                pass
            else:
                raise NotSequential(f"{len(self._calls)} of {len(self._blocks)} blocks were called")
        if self._start is None:
            raise AssertionError("stopped before the first block")
        return self._start, self._dedupe(tuple(ids.shape), self._calls)

    def finish(self, ids: Tensor, final: Tensor, observer: Observer) -> Any:
        """Run what stands behind the blocks on the last block's output; returns the model's output."""
        observer.start()
        observer.active = False
        last = len(self._blocks) - 1

        def forward(index: int) -> Callable[..., Any]:
            def stub(*args: Any, **kwargs: Any) -> Any:
                if index < last:
                    return self._output(_split(args, kwargs)[1])
                observer.active = True
                return self._output(final.to(self._blocks.device))

            return stub

        with self._patched([forward(i) for i in range(last + 1)]):
            return self._blocks.model(input_ids=ids.to(self._blocks.device))

    def _output(self, hidden: Tensor) -> Any:
        if self._form is None:
            return hidden
        return self._form((hidden, *(self._rest or ())))

    def _record(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def stub(*args: Any, **kwargs: Any) -> Any:
            call, hidden = _split(args, kwargs)
            if index != len(self._calls):
                raise NotSequential(f"block {index} is called after {len(self._calls)} others")
            if index == 0:
                self._start = hidden
                if self._observer is not None:
                    self._observer.active = False
                if not self._known:
                    self._learn(original(*args, **kwargs), hidden)
            elif hidden is not self._hidden or hidden._version != self._version:
                raise NotSequential(
                    f"something happens to the hidden state between blocks {index - 1} and {index}"
                )
            if any("Cache" in type(value).__name__ for value in (*call.args, *call.kwargs.values())):
                raise NotSequential(f"block {index} takes a cache")
            self._calls.append(call)
            if index == len(self._blocks) - 1:
                raise _Stop
            self._hidden, self._version = hidden, hidden._version
            return self._output(hidden)

        return stub

    def _learn(self, output: Any, hidden: Tensor) -> None:
        first = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(first, Tensor) or first.shape != hidden.shape:
            raise NotSequential(
                f"a block returns a {type(output).__name__} without the hidden state in front"
            )
        if isinstance(output, (tuple, list)):
            if any(isinstance(value, Tensor) for value in output[1:]):
                raise NotSequential("a block returns more than the hidden state")
            self._form, self._rest = type(output), tuple(output[1:])

    def _dedupe(self, shape: tuple[int, ...], calls: list[BlockCall]) -> list[BlockCall]:
        """The calls recorded before for this shape, if they are equal: masks and positions are kept once."""
        known = self._known.setdefault(shape, calls)
        return known if _equal(known, calls) else calls


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[BlockCall, Tensor]:
    """A block's arguments with its hidden state taken out."""
    if args and isinstance(args[0], Tensor):
        return BlockCall((_HIDDEN, *args[1:]), kwargs), args[0]
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return BlockCall(args, {**kwargs, "hidden_states": _HIDDEN}), kwargs["hidden_states"]
    raise NotSequential("a block is called without a hidden state in front")


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, BlockCall) and isinstance(b, BlockCall):
        return _equal(a.args, b.args) and _equal(a.kwargs, b.kwargs)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return isinstance(a, (int, float, str)) and type(a) is type(b) and a == b
