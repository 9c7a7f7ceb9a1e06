"""How much the model's output minds an error in each layer's output: what makes layers comparable.

With g the gradient of the log-likelihood of what the model itself would say, an error d in a layer's output
moves the model by KL = 1/2 E[(g . d)^2] a token, to second order. Taking gradients of different outputs as
uncorrelated leaves 1/2 sum_o E[g_o^2] E[d_o^2], and E[d_o^2] = (E H E^T)_oo for an error E of the weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_engine.block_calls import CallRecorder
from qlora_engine.blocks import Blocks, Mode, NotSequential, make_batches, prepared, run_model
from qlora_engine.errors import InputError
from qlora_engine.observe import ExpertProducts, Observer, Target, find_targets
from qlora_engine.partial_model import PartialModel


def output_sensitivity(
    source: nn.Module | PartialModel | str | Path,
    windows: Iterable[Tensor],
    targets: Iterable[str] | None = None,
    *,
    mode: Mode = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 1,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> dict[str, Tensor]:
    """Squared gradient by output of each layer, summed over its tokens and divided by the tokens of text.

    A forward and a backward pass; a few windows are enough. Labels are drawn from the model's own
    distribution, so that the Fisher information counts and not the fit to these texts. A model without logits
    is probed for the squared change of its last hidden state instead.

    Args:
        source: A model in memory (left alone), or the folder of a checkpoint.
        windows: Token ids, int64 (n,) each.
        targets: As in ``calibration.calibrate``; embeddings are left out.
        mode: "whole" needs the model and all activations of a batch in memory. "blocks" needs one block, and
            the hidden states of all windows before every block; it runs every block twice. "auto" is "blocks"
            for a folder where the model can, "whole" otherwise.
        device: Where to compute; None is where the model is, or the CPU.
        dtype: Of weights loaded from a folder.
        batch_size: Windows of equal length that run at once.
        seed: Of the labels.
        trust_remote_code: Let Python files of the folder run.

    Returns:
        Layer -> float32 (out,), for ``allocate.measure``; layers that no token reached have zeros.

    Raises:
        InputError: no such layer, no windows, a model with neither logits nor a last hidden state, or mode
            "blocks" for a model that cannot be run so.
    """
    if isinstance(source, (str, Path)):
        source = PartialModel(Path(source), dtype=dtype, trust_remote_code=trust_remote_code)
    on_disk = source if isinstance(source, PartialModel) else None
    model: Any = source.model if isinstance(source, PartialModel) else source
    if device is None:
        device = "cpu" if on_disk is not None else next(model.parameters()).device
    names = None if targets is None else [on_disk.names.get(n, n) if on_disk else n for n in targets]
    batches = list(make_batches(windows, batch_size, model))
    if not batches:
        raise InputError("no windows to measure sensitivities with")
    pass_ = _Pass(names, torch.device(device), seed)
    if mode == "blocks" or (mode == "auto" and on_disk is not None):
        try:
            return pass_.by_blocks(Blocks(model, torch.device(device), on_disk), batches)
        except NotSequential as reason:
            if mode == "blocks":
                raise InputError(f"cannot run this model block by block: {reason}") from reason
    if on_disk is not None:
        model = type(model).from_pretrained(on_disk.folder, dtype=dtype, trust_remote_code=trust_remote_code)
        model.to(device)
    return pass_.whole(model, batches)


class _Pass:
    """Sums of squared gradients over one backward pass."""

    def __init__(self, names: list[str] | None, device: torch.device, seed: int) -> None:
        self._names = names
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._sums: dict[str, Tensor] = {}
        self._tokens = 0

    def whole(self, model: Any, batches: list[Tensor]) -> dict[str, Tensor]:
        targets = self._targets(model)
        with prepared(model), _frozen(model), self._watched(model, targets.values()), torch.enable_grad():
            for ids in batches:
                self._score(run_model(model, ids.to(self._device))).backward()
        return self._means(targets)

    def by_blocks(self, blocks: Blocks, batches: list[Tensor]) -> dict[str, Tensor]:
        model, recorder, nobody = blocks.model, CallRecorder(blocks), Observer({})
        targets = self._targets(model)
        with prepared(model), _frozen(model):
            with blocks.present(None, 0), torch.no_grad():
                captured = [recorder.capture(ids, nobody) for ids in batches]
            calls = [call for _, call in captured]
            inputs = [[start.cpu() for start, _ in captured]]  # by block, of every batch
            for index in range(len(blocks)):
                with blocks.present(index), torch.no_grad():
                    layer = blocks.layers[index]
                    before = zip(calls, inputs[-1])
                    inputs.append([call[index](layer, x.to(self._device)).cpu() for call, x in before])
            around = [t for name, t in targets.items() if not name.startswith(f"{blocks.path}.")]
            gradients: list[Tensor] = []
            with blocks.present(None), self._watched(model, around), torch.enable_grad():
                for ids, final in zip(batches, inputs.pop()):
                    leaf = final.to(self._device).requires_grad_(True)
                    self._score(recorder.finish(ids, leaf, nobody)).backward()
                    gradients.append(_gradient(leaf))
            for index in reversed(range(len(blocks))):
                block, mine = blocks.layers[index], f"{blocks.prefix(index)}."
                within = [t for name, t in targets.items() if name.startswith(mine)]
                with blocks.present(index), self._watched(block, within), torch.enable_grad():
                    for n, x in enumerate(inputs.pop()):
                        leaf = x.to(self._device).requires_grad_(True)
                        calls[n][index](block, leaf).backward(gradients[n].to(self._device))
                        gradients[n] = _gradient(leaf)
            with blocks.present(None), self._watched(model, around), torch.enable_grad():
                for ids, gradient in zip(batches, gradients):
                    start, _ = recorder.capture(ids, nobody)
                    start.backward(gradient.to(self._device))
        return self._means(targets)

    def _targets(self, model: Any) -> dict[str, Target]:
        return {n: t for n, t in find_targets(model, self._names).items() if t.kind != "embedding"}

    def _means(self, targets: Mapping[str, Target]) -> dict[str, Tensor]:
        found = {name: self._sums.get(name, torch.zeros(_outputs(t))) for name, t in targets.items()}
        return {name: total / self._tokens for name, total in found.items()}

    def _see(self, target: Target, _: Any, output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            squares = gradient.detach().float().square().reshape(-1, gradient.shape[-1]).sum(0).cpu()
            self._sums[target.name] = self._sums.get(target.name, 0) + squares

        if output.requires_grad:
            output.register_hook(add)

    @contextmanager
    def _watched(self, module: nn.Module, targets: Iterable[Target]) -> Iterator[None]:
        """Gradients of these layers' outputs are summed; what embeddings give requires gradients."""
        targets = list(targets)
        with ExitStack() as stack:
            for target in targets:
                if target.kind != "expert":
                    handle = target.module.register_forward_hook(partial(self._hook, target))
                    stack.callback(handle.remove)
            for inner in module.modules():
                if isinstance(inner, nn.Embedding):
                    stack.callback(inner.register_forward_hook(_require_gradient).remove)
            experts = ExpertProducts(targets, self._see)
            if experts:
                stack.enter_context(experts)
            yield

    def _hook(self, target: Target, module: nn.Module, args: Any, output: Tensor) -> None:
        self._see(target, args, output)

    def _score(self, output: Any) -> Tensor:
        """A scalar whose gradient's second moment is the curvature; counts the positions it sums over."""
        logits = getattr(output, "logits", None)
        if logits is not None:
            logs = logits.float().log_softmax(-1).reshape(-1, logits.shape[-1])  # (positions, vocabulary)
            labels = torch.multinomial(logs.detach().exp(), 1, generator=self._generator)
            self._tokens += logs.shape[0]
            return -logs.gather(1, labels).sum()
        hidden = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
        if hidden is None:
            raise InputError(
                f"a model that returns {type(output).__name__} has neither logits nor a hidden state"
            )
        probe = torch.randn(hidden.shape, generator=self._generator, device=hidden.device)
        self._tokens += hidden.shape[:-1].numel()
        return (2**0.5 * hidden.float() * probe).sum()


def _require_gradient(module: nn.Module, args: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)


def _gradient(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise AssertionError("the output does not depend on the hidden state")
    return leaf.grad.cpu()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside; as before afterwards."""
    wanting = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def _outputs(target: Target) -> int:
    weight = target.weight
    if weight is None:
        return int(getattr(target.module, "out_features", 0))
    # Stacked experts may be stored either way round; one that no token reached shows only zeros.
    return weight.shape[1] if target.kind == "conv1d" else weight.shape[0]
