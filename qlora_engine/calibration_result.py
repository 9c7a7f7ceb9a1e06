"""What calibration found: the second moment of each layer's inputs, with the facts to judge and reuse it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_engine.errors import InputError
from qlora_engine.hessian import shrink
from qlora_engine.hessian_file import HessianFile, HessianWriter

VERSION = 1
# Below it a calibrated solution was hardly better than LoftQ on other text (SmolLM2, widths 1536 and 576, H
# shrunk): 1.03 and .91 times its error at 16 tokens, .98 and .86 at 32, .95 and .84 at 64.
MIN_TOKENS = 64
_SAMPLES = 16
_HEADER_ROOM = 1 << 16
_HEADER_ROOM_A_LAYER = 2048


@dataclass(frozen=True)
class LayerInputs:
    """What calibration saw of one layer.

    Attributes:
        tokens: Inputs counted; of an expert, those that were routed to it.
        width: Input features (of an embedding its rows); 0 if it was never fed.
        kind: "full", "diagonal" or "none".
        stored: Name under which H is kept; layers with the same inputs have the same.
        dead: Features that were zero for every token.
        shrinkage: How far few tokens make it wise to shrink the correlations in H, in [0, 1].
        condition: Estimate of the condition of H; None where it was not estimated.
        weight_shape: As stored in the model.
        weight_sample: Values at even distances, to know the model again.
    """

    tokens: int
    width: int
    kind: str
    stored: str = ""
    dead: int = 0
    shrinkage: float = 0.0
    condition: float | None = None
    weight_shape: tuple[int, ...] = ()
    weight_sample: tuple[float, ...] = ()


@dataclass(frozen=True)
class Calibration(Mapping[str, Tensor]):
    """Layer name -> H, float32 (in, in) or the diagonal (in,), and how it was found.

    Names are module paths. Where the checkpoint on disk names a layer differently from the model in memory
    (an expert that transformers stacks with others), both names work.

    Attributes:
        layers: Facts by layer, of those without H too.
        names: Name on disk -> name in ``layers``, where they differ.
        model: Class of the model.
        windows: Texts run through it.
        tokens: Tokens in them.
        seconds: Wall time.
        mode: "whole" or "blocks".
        min_tokens: Fewer make a Hessian that ``hessian`` does not give; None is ``MIN_TOKENS``.
        notes: What a reader of the report should know.
        means: E[x], float32 (in,), under the names of ``LayerInputs.stored``.
        sensitivities: Layer -> how much the loss minds its outputs, float32 (out,); empty if not asked for.
    """

    layers: Mapping[str, LayerInputs]
    tensors: Mapping[str, Tensor] = field(repr=False)
    names: Mapping[str, str] = field(default_factory=dict, repr=False)
    model: str = ""
    windows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    mode: str = "whole"
    min_tokens: int | None = None
    notes: tuple[str, ...] = ()
    means: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    sensitivities: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Tensor:
        layer = self.layers[self.names.get(name, name)]
        if layer.kind == "none":
            raise KeyError(name)
        return self.tensors[layer.stored]

    def __iter__(self) -> Iterator[str]:
        return (name for name, layer in self.layers.items() if layer.kind != "none")

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def hessian(self, name: str, weight: Tensor | None = None, *, shrunk: bool = True) -> Tensor | None:
        """H of a layer, to solve with; None where calibration cannot be used, and ``problem`` says why.

        Args:
            name: Module path, in memory or on disk.
            weight: The layer's weight as stored, to make sure that this calibration is of this model.
            shrunk: Reduce the correlations as far as few tokens make them unreliable (``hessian.shrink``).
                False, like ``self[name]``: the second moment as it was counted.

        Raises:
            InputError: another model's calibration.
        """
        if self.problem(name) is not None:
            return None
        if weight is not None:
            self.check(name, weight)
        counted, layer = self[name], self.layers[self.names.get(name, name)]
        if counted.shape[-1] != layer.width:
            raise InputError(f"calibration of {name}: H is for {counted.shape[-1]} inputs, not {layer.width}")
        return shrink(counted, layer.shrinkage) if shrunk else counted

    def problem(self, name: str) -> str | None:
        """Why ``hessian`` gives None, for the report; None if it gives H."""
        layer = self.layers.get(self.names.get(name, name))
        if layer is None:
            return "not calibrated"
        if layer.kind == "none":
            return "no calibration token reached it"
        needed = MIN_TOKENS if self.min_tokens is None else self.min_tokens
        if layer.tokens < needed:
            return f"only {layer.tokens} calibration tokens reached it; {needed} are needed"
        return None

    def mean_input(self, name: str) -> Tensor:
        """E[x] of a layer's inputs, float32 (in,).

        Raises:
            KeyError: no token reached it.
        """
        return self.means[self.layers[self.names.get(name, name)].stored]

    def sensitivity(self, name: str) -> Tensor | None:
        """How much the loss minds each output of a layer, float32 (out,); None if it was not measured."""
        return self.sensitivities.get(self.names.get(name, name))

    def groups(self) -> dict[str, str]:
        """Layer (by its names in memory and on disk) -> a name that layers with the same inputs share."""
        inside = {name: layer.stored for name, layer in self.layers.items() if layer.stored}
        return inside | {disk: inside[name] for disk, name in self.names.items() if name in inside}

    def check(self, name: str, weight: Tensor) -> None:
        """Compare a weight with the one that was calibrated, whatever float dtype either is in.

        Raises:
            InputError: another shape, or other values.
        """
        layer = self.layers[self.names.get(name, name)]
        if not layer.weight_shape or tuple(weight.shape) != layer.weight_shape:
            # A stacked expert holds what the disk has in two; only the inputs must fit.
            if layer.width not in weight.shape:
                raise InputError(
                    f"calibration of {name} is for {layer.width} inputs, the weight is {tuple(weight.shape)}"
                )
            return
        expected = torch.tensor(layer.weight_sample)
        found = torch.tensor(sample_weight(weight))
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0.02, atol=1e-6):
            raise InputError(f"the calibration was made with another model: the weight of {name} differs")

    def summary(self) -> dict[str, Any]:
        """JSON-able facts for a report."""
        problems = {name: self.problem(name) for name in self.layers}
        conditions = [c for layer in self.layers.values() if (c := layer.condition) is not None]
        return {
            "mode": self.mode,
            "windows": self.windows,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "layers": len(self.layers),
            "hessians": len({layer.stored for layer in self.layers.values() if layer.stored}),
            "not_usable": {name: problem for name, problem in problems.items() if problem},
            "most_shrunk": max((layer.shrinkage for layer in self.layers.values()), default=0.0),
            "worst_condition": _number(max(conditions)) if conditions else None,
            "notes": list(self.notes),
        }

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all; every shared H once.

        Raises:
            OSError: what the disk says.
        """
        writer = HessianWriter(Path(path), header_bytes=header_bytes(len(self.layers), self.names))
        try:
            for stored in {layer.stored: None for layer in self.layers.values() if layer.stored}:
                writer.add(stored, self.tensors[stored])
            self.write_vectors(writer)
            writer.close({"format": "pt", "calibration": json.dumps(self.facts())})
        except BaseException:
            writer.abort()
            raise

    def write_vectors(self, writer: HessianWriter) -> None:
        """Mean inputs and sensitivities, into a file that is being written."""
        for name, values in self.means.items():
            writer.add_vector("mean", name, values)
        for name, values in self.sensitivities.items():
            writer.add_vector("sensitivity", name, values)

    def facts(self) -> dict[str, Any]:
        """Everything but the tensors, JSON-able."""
        layers = {
            name: {**asdict(layer), "condition": _number(layer.condition)}
            for name, layer in self.layers.items()
        }
        return {
            "version": VERSION,
            "model": self.model,
            "windows": self.windows,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "mode": self.mode,
            "min_tokens": self.min_tokens,
            "notes": list(self.notes),
            "names": dict(self.names),
            "layers": layers,
        }

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Open a file; each H is read when it is asked for.

        Raises:
            InputError: not a calibration, or of another version.
            OSError: it cannot be read.
        """
        tensors = HessianFile(Path(path))
        try:
            facts = json.loads(tensors.metadata["calibration"])
            if facts["version"] != VERSION:
                raise InputError(f"{path}: calibration version {facts['version']}; this reads {VERSION}")
            layers = {name: _layer(values) for name, values in facts["layers"].items()}
            missing = {layer.stored for layer in layers.values() if layer.stored} - set(tensors)
            if missing:
                raise InputError(f"{path}: {len(missing)} Hessians are missing, among them {min(missing)}")
            return cls(
                layers=layers,
                tensors=tensors,
                names={str(disk): str(inside) for disk, inside in facts["names"].items()},
                model=str(facts["model"]),
                windows=_count(facts["windows"]),
                tokens=_count(facts["tokens"]),
                seconds=float(facts["seconds"]),
                mode=str(facts["mode"]),
                min_tokens=None if facts["min_tokens"] is None else _count(facts["min_tokens"]),
                notes=tuple(map(str, facts["notes"])),
                means=tensors.vectors["mean"],
                sensitivities=tensors.vectors["sensitivity"],
            )
        except InputError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise InputError(f"{path} is not a calibration file: {error!r:.200}") from error


def header_bytes(layers: int, aliases: Mapping[str, str]) -> int:
    """Room that the facts about so many layers take in a file's header, generously."""
    named = sum(2 * (len(k) + len(v)) + 16 for k, v in aliases.items())
    return _HEADER_ROOM + layers * _HEADER_ROOM_A_LAYER + named


def sample_weight(weight: Tensor) -> tuple[float, ...]:
    """Values at even distances, by which a weight is known again."""
    flat = weight.detach().reshape(-1)
    step = max(flat.numel() // _SAMPLES, 1)
    return tuple(flat[::step][:_SAMPLES].float().cpu().tolist())


def _number(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return "inf" if value is not None and math.isinf(value) else value


def _layer(values: dict[str, Any]) -> LayerInputs:
    condition_ = values["condition"]
    layer = LayerInputs(
        **values
        | {
            "condition": None if condition_ is None else float(condition_),
            "weight_shape": tuple(map(_count, values["weight_shape"])),
            "weight_sample": tuple(map(float, values["weight_sample"])),
            "shrinkage": float(values["shrinkage"]),
            "tokens": _count(values["tokens"]),
            "width": _count(values["width"]),
        }
    )
    if layer.kind not in ("full", "diagonal", "none") or not isinstance(layer.stored, str):
        raise TypeError(f"kind {layer.kind!r}, stored {layer.stored!r:.40}")
    if layer.kind != "none" and not layer.stored:
        raise TypeError(f"a layer of kind {layer.kind!r} without a Hessian")
    return layer


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r:.40} is no count")
    return value
