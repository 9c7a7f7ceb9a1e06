"""The alike blocks of a model: found, their weights brought in and put away; windows made into batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlora_engine.errors import InputError
from qlora_engine.partial_model import PartialModel

Mode = Literal["auto", "whole", "blocks"]


class NotSequential(Exception):
    """The model cannot be run block by block; the message says why."""


class Blocks:
    """The blocks of a model, and the weights of its parts brought in and put away.

    Args:
        model: In memory, or the model of ``partial``.
        device: Where parts compute.
        partial: Where weights come from; None: they are in ``model`` and go back to the device they were on.
    """

    def __init__(self, model: Any, device: torch.device, partial: PartialModel | None) -> None:
        self.model = model
        self.device = device
        self.path, self.layers = find_blocks(model)
        self._partial = partial
        self._home: dict[str, torch.device] = {}

    def __len__(self) -> int:
        return len(self.layers)

    def prefix(self, index: int) -> str:
        return f"{self.path}.{index}"

    def _names(self, index: int | None) -> list[str]:
        """Parameters and buffers of a block, or (None) of everything around the blocks."""
        names = [n for n, _ in self.model.named_parameters(remove_duplicate=False)]
        names += [n for n, _ in self.model.named_buffers()]
        if index is not None:
            return [n for n in names if n.startswith(f"{self.prefix(index)}.")]
        return [n for n in names if not n.startswith(f"{self.path}.")]

    @contextmanager
    def present(self, *parts: int | None) -> Iterator[None]:
        """The weights of these blocks (None: of what is around them) are on the device inside."""
        names = [name for part in parts for name in self._names(part)]
        if self._partial is not None:
            self._partial.load(names, self.device)
            try:
                yield
            finally:
                # A caller may have put other modules in place: drop what is there now.
                self._partial.drop([name for part in parts for name in self._names(part)])
            return
        homes = {part: {self._move(name) for name in self._names(part)} - {None} for part in parts}
        try:
            yield
        finally:
            for part, left in homes.items():
                for home in left:  # one device, or the part stays where it computed
                    for name in self._names(part) if len(left) == 1 else ():
                        self._move(name, home)

    def _move(self, name: str, device: torch.device | None = None) -> torch.device | None:
        """Move one parameter or buffer; the device that it left, or None if it was there already."""
        holder, _, leaf = name.rpartition(".")
        tensor = getattr(self.model.get_submodule(holder), leaf)
        before, target = tensor.device, device or self.device
        if before == target or (target.index is None and before.type == target.type):
            return None
        tensor.data = tensor.data.to(target)
        return before


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the model's blocks: of the lists as long as the configuration says, the heaviest.

    Raises:
        NotSequential: none, or an encoder with a decoder.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise NotSequential(f"{type(model).__name__} has no configuration that tells its number of blocks")
    if getattr(config, "is_encoder_decoder", False):
        raise NotSequential("an encoder with a decoder is not one list of blocks")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None)
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if not lists:
        raise NotSequential(f"{type(model).__name__} has no list of {count} blocks")
    weights = {path: sum(p.numel() for p in module.parameters()) for path, module in lists.items()}
    path = max(lists, key=lambda name: (weights[name], -len(name)))
    return path, lists[path]


@contextmanager
def prepared(model: Any) -> Iterator[None]:
    """Evaluation mode, no cache, experts one by one; as it was afterwards."""
    training = model.training
    configs: list[Any] = [c for c in (getattr(model, "config", None),) if c is not None]
    configs += [c.get_text_config() for c in configs if hasattr(c, "get_text_config")]
    caches = [(c, c.use_cache) for c in configs if hasattr(c, "use_cache")]
    experts = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else None
    try:
        model.eval()
        for config, _ in caches:
            config.use_cache = False
        if experts is not None:
            model.set_experts_implementation("eager")
        yield
    finally:
        model.train(training)
        for config, value in reversed(caches):
            config.use_cache = value
        if experts is not None:
            model.set_experts_implementation(experts)


def run_model(model: Any, ids: Tensor, *, part: Any = None) -> Any:
    """The output of ``model``, or of ``part`` of it, for token ids (batch, n).

    An encoder-decoder reads the first half of each window and writes the second.
    """
    runner = model if part is None else part
    config = getattr(model, "config", None)
    if config is None:
        return runner(ids)
    if getattr(config, "is_encoder_decoder", False):
        middle = ids.shape[1] // 2
        return runner(input_ids=ids[:, :middle], decoder_input_ids=ids[:, middle:])
    return runner(input_ids=ids)


def make_batches(windows: Iterable[Tensor], batch_size: int, model: Any) -> Iterator[Tensor]:
    """Stack runs of windows of one length: int64 (batch, n), without padding.

    Raises:
        InputError: a window longer than the model takes, or with ids outside its vocabulary.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    vocabulary = getattr(text, "vocab_size", None)
    waiting: list[Tensor] = []
    for window in windows:
        if longest is not None and window.numel() > longest:
            raise InputError(f"a window of {window.numel()} tokens; the model takes {longest}")
        if (
            vocabulary is not None
            and window.numel()
            and not 0 <= int(window.min()) <= int(window.max()) < vocabulary
        ):
            raise InputError(
                f"token id {int(window.max())} in a model of {vocabulary} tokens: is the tokenizer its own?"
            )
        if waiting and (waiting[0].shape != window.shape or len(waiting) == batch_size):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(window)
    if waiting:
        yield torch.stack(waiting)
