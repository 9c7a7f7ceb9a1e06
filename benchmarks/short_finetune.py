"""A short fine-tuning run from a given start: frozen dense bases, trained factors, plain torch.

The base is what would be stored, dequantised, so that every start (and PEFT's) goes through the same loop and
differs in its numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.activations import perplexity

Start = tuple[Tensor, Tensor, Tensor]  # base (out, in), A (rank, in), B (out, rank): W ~ base + B @ A


class LowRankLinear(nn.Module):
    """``y = x base^T + (x A^T) B^T + bias``; A and B train."""

    def __init__(self, dense: nn.Linear, start: Start) -> None:
        super().__init__()
        base, A, B = start
        self.bias = dense.bias
        self.register_buffer("base", base)
        self.A = nn.Parameter(A.clone())
        self.B = nn.Parameter(B.clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = nn.functional.linear(x, self.base, self.bias)  # type: ignore[arg-type]  # a buffer
        return y + (x @ self.A.T) @ self.B.T


@contextmanager
def started(model: nn.Module, starts: Mapping[str, Start]) -> Iterator[list[nn.Parameter]]:
    """The model with the named Linears in their start; gives what trains; restores the model afterwards."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    dense: dict[str, nn.Linear] = {}
    trained: list[nn.Parameter] = []
    try:
        for name, start in starts.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            dense[name] = linear
            layer = LowRankLinear(linear, start)
            model.set_submodule(name, layer)
            trained += [layer.A, layer.B]
        yield trained
    finally:
        for name, linear in dense.items():
            model.set_submodule(name, linear)
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)


def losses_of(
    model: nn.Module, trained: list[nn.Parameter], tokens: Tensor, *, steps: int, batch: int, rate: float
) -> list[float]:
    """Train ``steps`` AdamW steps on ``batch`` windows each, in the order of ``tokens`` (n, length)."""
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    found = []
    for step in range(steps):
        rows = tokens[[i % len(tokens) for i in range(step * batch, (step + 1) * batch)]]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    return found


def finetune(
    model: nn.Module,
    starts: Mapping[str, Start],
    tokens: Tensor,
    evaluation: Tensor,
    *,
    steps: int,
    batch: int,
    rate: float,
) -> tuple[float, float]:
    """Perplexity on ``evaluation`` before and after training; the model is as it was afterwards."""
    with started(model, starts) as trained:
        before = perplexity(model, evaluation)
        losses_of(model, trained, tokens, steps=steps, batch=batch, rate=rate)
        return before, perplexity(model, evaluation)
