"""What a model does with text: the second moments of its Linears' inputs, and its perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora_engine.hessian import SecondMoment


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every Linear but the output head, by name."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


@torch.inference_mode()
def input_moments(model: nn.Module, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """H = E[x x^T] of the named Linears' inputs over the tokens, float32 (in, in).

    Linears that share their input (q, k, v; gate, up) share its H.
    """
    modules = dict(model.named_modules())
    moments: dict[str, SecondMoment] = {}
    shared: dict[str, str] = {}
    seen: tuple[Tensor, str] | None = None

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal seen
            if seen is not None and seen[0] is inputs[0]:
                shared[name] = seen[1]
                return
            seen = (inputs[0], name)
            if name not in moments:
                moments[name] = SecondMoment(inputs[0].shape[-1])
            moments[name].add(inputs[0])

        return hook

    handles = [modules[name].register_forward_pre_hook(watch(name)) for name in names]
    try:
        for batch in _batches(tokens):
            model(input_ids=batch)
    finally:
        for handle in handles:
            handle.remove()
    means = {name: moment.mean() for name, moment in moments.items()}
    return {name: means[shared.get(name, name)] for name in names}


@torch.inference_mode()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """exp of the mean negative log-likelihood of every next token within the windows (n, length)."""
    total = 0.0
    for batch in _batches(tokens):
        logits = model(input_ids=batch).logits[:, :-1].float()  # (b, length - 1, vocabulary)
        targets = batch[:, 1:]
        total += nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return math.exp(total / tokens[:, 1:].numel())


def _batches(tokens: Tensor) -> Iterator[Tensor]:
    """Rows in batches of about 2048 tokens: enough for BLAS, few enough for the logits to fit."""
    yield from tokens.split(max(1, 2048 // tokens.shape[1]))
