"""Calibration: run text through a model and keep the second moment of every layer's inputs.

    windows = load_texts("texts.jsonl", tokenizer)
    calibration = calibrate("path/to/model", windows, save_to="calibration.safetensors")
    H = calibration.hessian("model.layers.0.mlp.down_proj", weight)    # None: not enough tokens, plain LoftQ

A model in memory runs as a whole, once. A checkpoint folder runs block by block, so that one block's weights
and Hessians are in memory; a model that is not a list of blocks runs as a whole, and the result says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_engine.blocks import Mode, NotSequential, make_batches, prepared, run_model
from qlora_engine.blockwise import LayerMoment, layer_moments, walk_blocks
from qlora_engine.calibration_result import (
    Calibration,
    LayerInputs,
    header_bytes,
    sample_weight,
)
from qlora_engine.errors import InputError
from qlora_engine.hessian import condition, dead_inputs
from qlora_engine.hessian_file import HessianWriter
from qlora_engine.observe import Observer, Target, find_targets
from qlora_engine.partial_model import PartialModel
from qlora_engine.sensitivity import output_sensitivity

__all__ = ["Calibration", "LayerInputs", "calibrate"]

Progress = Callable[[int, int, str], None]
CONDITION_UP_TO = 4096  # wider, the Cholesky factor of the estimate takes seconds a layer on a CPU


def calibrate(
    source: nn.Module | str | Path,
    windows: Iterable[Tensor],
    targets: Iterable[str] | None = None,
    *,
    mode: Mode = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 4,
    activation_dtype: torch.dtype | None = None,
    max_full_width: int | None = None,
    min_tokens: int | None = None,
    sensitivity_windows: int = 0,
    save_to: str | Path | None = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Calibration:
    """Second moments of the inputs of a model's layers over some windows of text.

    Args:
        source: A model in memory (its weights are left alone), or the folder of a checkpoint.
        windows: Token ids, int64 (n,) each: ``texts.load_texts``. An encoder-decoder gets the first half of a
            window to read and the second to write.
        targets: Module paths, in memory or on disk; of stacked experts (transformers 5) also the parameter's
            path (all experts) or that and an index. None: every linear layer and expert but the head. Layers
            that are embeddings get the frequency of each token, the diagonal of their H.
        mode: "whole" runs the model once in memory; "blocks" runs block by block; "auto" is "blocks" for a
            folder where the model can, "whole" otherwise.
        device: Where to compute; None is where the model is, or the CPU.
        dtype: Of weights loaded from a folder.
        batch_size: Windows of equal length that run at once.
        activation_dtype: Of hidden states that wait between blocks; None is the model's.
        max_full_width: Wider inputs keep only the diagonal of H. None: all are kept whole, 4 bytes times the
            square of the width each.
        min_tokens: A layer with fewer is left out of ``Calibration.hessian``; None is ``MIN_TOKENS``.
        sensitivity_windows: Measure on so many of the windows how much the loss minds each layer's outputs
            (``Calibration.sensitivities``): it makes layers comparable when a budget of bits is shared out. A
            few are enough; it costs about three passes over them, in the same mode.
        save_to: File for the Hessians. With blocks they are written as they are found and not kept: memory
            then holds those of one block.
        progress: Called with steps done, steps in all and what was done.
        trust_remote_code: Let Python files of the folder run.

    Raises:
        InputError: no such layer or folder, windows that do not fit the model, inputs that are not finite, or
            mode "blocks" for a model that cannot be run so.
        OSError: ``save_to`` cannot be written.
    """
    if mode not in ("auto", "whole", "blocks"):
        raise ValueError(f"mode must be auto, whole or blocks, got {mode!r}")
    start = time.perf_counter()
    texts = list(windows)
    if not texts:
        raise InputError("no windows to calibrate with")
    partial = None
    if not isinstance(source, nn.Module):
        partial = PartialModel(Path(source), dtype=dtype, trust_remote_code=trust_remote_code)
    model: Any = source if partial is None else partial.model
    names = None if targets is None else list(targets)
    if names is not None and partial is not None:
        names = [partial.names.get(name, name) for name in names]
    found = find_targets(model, names)
    aliases = {} if partial is None else {k: v for k, v in partial.names.items() if v in found}
    collector = _Collector(found, None if save_to is None else Path(save_to), aliases, device)
    notes: list[str] = []
    used = mode
    with collector:
        if mode == "blocks" or (mode == "auto" and partial is not None):
            try:
                steps = walk_blocks(
                    partial or model,
                    texts,
                    list(found),
                    device=device,
                    batch_size=batch_size,
                    activation_dtype=activation_dtype,
                    max_full_width=max_full_width,
                )
                for step in steps:
                    collector.take(step.targets, step.moments)
                    if progress is not None:
                        done = min(step.index + 1, step.count)
                        progress(done, step.count, step.path or "around the blocks")
                used = "blocks"
            except NotSequential as reason:
                if mode == "blocks":
                    raise InputError(f"cannot calibrate this model block by block: {reason}") from reason
                notes.append(f"calibrated as a whole, in memory: {reason}")
                used = "whole"
        else:
            used = "whole"
        if used == "whole":
            if partial is not None:
                model = type(model).from_pretrained(
                    partial.folder, dtype=dtype, trust_remote_code=trust_remote_code
                )
                found = find_targets(model, list(found))
            observer = _run_whole(model, texts, found, device, batch_size, max_full_width, progress)
            collector.take(found, layer_moments(observer.finish()))
        sensitivities: dict[str, Tensor] = {}
        if sensitivity_windows:
            sensitivities = output_sensitivity(
                partial if partial is not None and used == "blocks" else model,
                texts[:: max(len(texts) // sensitivity_windows, 1)][:sensitivity_windows],
                list(found),
                mode=used,
                device=device,
            )
        unseen = [name for name, layer in collector.layers.items() if layer.kind == "none"]
        if unseen:
            notes.append(f"{len(unseen)} layers were fed no token, among them {unseen[0]}")
        wide = [
            name
            for name, layer in collector.layers.items()
            if layer.kind == "diagonal" and found[name].kind != "embedding"
        ]
        if wide:
            notes.append(
                f"{len(wide)} layers have more than {max_full_width} inputs, among them {wide[0]}: only the "
                "diagonal of their second moment was kept"
            )
        calibration = Calibration(
            layers={name: collector.layers[name] for name in found},
            tensors=collector.tensors,
            names=aliases,
            model=type(model).__name__,
            windows=len(texts),
            tokens=sum(window.numel() for window in texts),
            seconds=time.perf_counter() - start,
            mode=used,
            min_tokens=min_tokens,
            notes=tuple(notes),
            means=collector.means,
            sensitivities=sensitivities,
        )
        return collector.finish(calibration)


def _run_whole(
    model: Any,
    texts: list[Tensor],
    targets: dict[str, Target],
    device: torch.device | str | None,
    batch_size: int,
    max_full_width: int | None,
    progress: Progress | None,
) -> Observer:
    """Every window through the whole model, without its head where no target needs it."""
    home = next(model.parameters()).device
    runner = getattr(model, "base_model", model)
    inside = set(map(id, runner.modules()))
    if any(id(target.module) not in inside for target in targets.values()):
        runner = model
    batches = list(make_batches(texts, batch_size, model))
    observer = Observer(targets, max_full_width=max_full_width)
    with prepared(model), torch.no_grad():
        try:
            if device is not None:
                model.to(device)
            with observer:
                for n, ids in enumerate(batches):
                    observer.start()
                    ids = ids.to(device if device is not None else home)
                    run_model(model, ids, part=runner)
                    if progress is not None:
                        progress(n + 1, len(batches), "windows")
        finally:
            if device is not None:
                model.to(home)
    return observer


class _Collector:
    """Takes Hessians as they come, into memory or into a file, with the facts about each layer."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        path: Path | None,
        aliases: Mapping[str, str],
        device: torch.device | str | None,
    ) -> None:
        self._device = device
        self.layers: dict[str, LayerInputs] = {}
        self.tensors: dict[str, Tensor] = {}
        self.means: dict[str, Tensor] = {}
        self._path = path
        self._room = header_bytes(len(targets), aliases)
        self._writer: HessianWriter | None = None
        self._stack = ExitStack()

    def __enter__(self) -> _Collector:
        if self._path is not None:
            self._writer = HessianWriter(self._path, header_bytes=self._room)
            self._stack.callback(self._writer.abort)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def take(self, targets: Mapping[str, Target], moments: Mapping[str, LayerMoment]) -> None:
        facts: dict[int, LayerInputs] = {}
        for name, target in targets.items():
            weight = target.weight
            sample = () if weight is None or weight.is_meta else sample_weight(weight)
            shape = () if weight is None else tuple(weight.shape)
            if name not in moments:
                self.layers[name] = LayerInputs(0, 0, "none", weight_shape=shape, weight_sample=sample)
                continue
            moment = moments[name]
            if id(moment) not in facts:
                facts[id(moment)] = self._store(name, moment)
            known = facts[id(moment)]
            self.layers[name] = replace(known, weight_shape=shape, weight_sample=sample)

    def _store(self, name: str, moment: LayerMoment) -> LayerInputs:
        hessian = moment.hessian
        self.means[name] = moment.mean
        if self._writer is None:
            self.tensors[name] = hessian
        else:
            self._writer.add(name, hessian)
        return LayerInputs(
            moment.tokens,
            hessian.shape[-1],
            "full" if hessian.ndim == 2 else "diagonal",
            stored=name,
            dead=int(dead_inputs(hessian).sum()),
            condition=self._condition(hessian),
            shrinkage=moment.shrinkage,
        )

    def _condition(self, hessian: Tensor) -> float | None:
        if hessian.shape[-1] > CONDITION_UP_TO:
            return None
        return condition(hessian if self._device is None else hessian.to(self._device))

    def finish(self, calibration: Calibration) -> Calibration:
        if self._writer is None or self._path is None:
            return calibration
        calibration.write_vectors(self._writer)
        self._writer.close({"format": "pt", "calibration": json.dumps(calibration.facts())})
        self._stack.pop_all()
        return Calibration.load(self._path)
