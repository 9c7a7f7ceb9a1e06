"""How much the model's output minds an error in each layer's output: what makes layers comparable.

With g the gradient of the log-likelihood of what the model itself would say, an error d in a layer's output
moves the model by KL = 1/2 E[(g . d)^2] a token, to second order. Taking gradients of different outputs as
uncorrelated leaves 1/2 sum_o E[g_o^2] E[d_o^2], and E[d_o^2] = (E H E^T)_oo for an error E of the weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qlora_engine.blocks import make_batches, prepared, run_model
from qlora_engine.errors import InputError
from qlora_engine.observe import ExpertProducts, Target, find_targets


def output_sensitivity(
    model: nn.Module,
    windows: Iterable[Tensor],
    targets: Iterable[str] | None = None,
    *,
    batch_size: int = 1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Squared gradient by output of each layer, summed over its tokens and divided by the tokens of text.

    One forward and one backward pass over the windows, the model and a batch's activations in memory; a few
    windows are enough. Labels are drawn from the model's own distribution, so that the Fisher information
    counts and not the fit to these texts. A model without logits is probed for the squared change of its last
    hidden state instead.

    Args:
        model: In memory; its parameters get no gradient and are left alone.
        windows: Token ids, int64 (n,) each.
        targets: As in ``calibration.calibrate``.
        batch_size: Windows of equal length that run at once.
        seed: Of the labels.

    Returns:
        Layer -> float32 (out,), for ``allocate.measure``; layers that no token reached have zeros.

    Raises:
        InputError: no such layer, no windows, or a model with neither logits nor a last hidden state.
    """
    found = {name: t for name, t in find_targets(model, targets).items() if t.kind != "embedding"}
    sums: dict[str, Tensor] = {}

    def see(target: Target, _: Any, output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            squares = gradient.detach().float().square().reshape(-1, gradient.shape[-1]).sum(0).cpu()
            sums[target.name] = sums.get(target.name, 0) + squares

        if output.requires_grad:
            output.register_hook(add)

    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    wanting = [p for p in model.parameters() if p.requires_grad]
    tokens = 0
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        with prepared(model), torch.enable_grad(), ExitStack() as stack:
            _watch(model, found, see, stack)
            for ids in make_batches(windows, batch_size, model):
                output = run_model(model, ids.to(device))
                logits = getattr(output, "logits", None)
                score, count = _score(output if logits is None else logits, logits is not None, generator)
                score.backward()
                tokens += count
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
    if not tokens:
        raise InputError("no windows to measure sensitivities with")
    return {name: sums.get(name, torch.zeros(_outputs(t))) / tokens for name, t in found.items()}


def _watch(model: Any, targets: dict[str, Target], see: Any, stack: ExitStack) -> None:
    """Hooks that see the targets' outputs, and make what the embeddings give require gradients."""

    def hook(target: Target) -> Any:
        return lambda _, args, output: see(target, args, output)

    for target in targets.values():
        if target.kind != "expert":
            stack.callback(target.module.register_forward_hook(hook(target)).remove)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            handle = module.register_forward_hook(lambda _, args, output: output.requires_grad_(True))
            stack.callback(handle.remove)
    experts = ExpertProducts(targets.values(), see)
    if experts:
        stack.enter_context(experts)


def _score(output: Any, is_logits: bool, generator: torch.Generator) -> tuple[Tensor, int]:
    """A scalar whose gradient's second moment is the curvature, and the positions that it sums over."""
    if is_logits:
        logs = output.float().log_softmax(-1).reshape(-1, output.shape[-1])  # (positions, vocabulary)
        labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        return -logs.gather(1, labels).sum(), logs.shape[0]
    hidden = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise InputError(
            f"a model that returns {type(output).__name__} has neither logits nor a hidden state"
        )
    probe = torch.randn(hidden.shape, generator=generator, device=hidden.device)
    return (2**0.5 * hidden.float() * probe).sum(), hidden.shape[:-1].numel()


def _outputs(target: Target) -> int:
    weight = target.weight
    if weight is None:
        return int(getattr(target.module, "out_features", 0))
    # Stacked experts may be stored either way round; one that no token reached shows only zeros.
    return weight.shape[1] if target.kind == "conv1d" else weight.shape[0]
