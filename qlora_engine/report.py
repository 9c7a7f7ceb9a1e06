"""What a run cost and what it gained, by layer and in total: the data, and its JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import platform
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import read_json_object, write_json

REPORT_FILE = "report.json"
VERSION = 1
_LARGEST = 1e100  # squares of sums of numbers below it are finite


def versions() -> dict[str, str]:
    """Of this package, what computes, and the Python it runs in."""
    found = {"python": platform.python_version()}
    for name in ("qlora-engine", "torch", "transformers", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are fields of ``cls``, lists as tuples, each of the type that the field has.

    Raises:
        TypeError: one of another type, or a number that is not finite.
    """
    hints = _hints(cls)
    return {key: _typed(key, value, hints[key]) for key, value in values.items() if key in hints}


def _typed(name: str, value: Any, hint: Any) -> Any:
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for choice in choices:
        kind, inner = typing.get_origin(choice) or choice, typing.get_args(choice)
        if kind is tuple and isinstance(value, (list, tuple)):
            return tuple(_typed(name, item, inner[0]) for item in value)
        if kind is dict and isinstance(value, dict):
            return {_typed(name, k, str): _typed(name, v, inner[1]) for k, v in value.items()}
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind is float and number and abs(value) < _LARGEST:
            return value
        if kind is int and isinstance(value, int) and number and abs(value) < 1 << 63:
            return value
        if kind is str and isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value):
            return value
        if kind is Any or (kind not in (int, float, str, tuple, dict) and isinstance(value, kind)):
            return value
    raise TypeError(f"{name} is {value!r:.60}")


@dataclass(frozen=True)
class LayerReport:
    """One quantised weight.

    Attributes:
        name: Module path.
        kind: "linear", "conv1d" or "embedding".
        shape: (out_features, in_features), of an embedding (rows, dim).
        format, block_size, double_quant: How it is quantised.
        rank: Of its adapter; 0: it has none.
        scaling: PEFT's factor of the adapter's product.
        bits_per_weight: Of what is stored, scales included.
        weight_norm: ||W||_F.
        error_plain: ||W - Q||_F / ||W||_F of plain (absmax) quantisation in the same format.
        error: The same for what is stored, adapter included.
        output_error_plain, output_error: The same of the layer's output; None without calibration.
        trace: The solver's objective by iteration; entry 0 is its base without an adapter.
        best: Index into ``trace`` of what was kept.
        iterations: Alternations that were run.
        seconds: Time to solve.
        bytes_in, bytes_out: Of the weight on disk, before and after (adapter not counted).
        note: Anything unusual, a sentence.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    format: str
    block_size: int
    double_quant: bool
    rank: int
    scaling: float
    bits_per_weight: float
    weight_norm: float
    error_plain: float
    error: float
    output_error_plain: float | None = None
    output_error: float | None = None
    trace: tuple[float, ...] = ()
    best: int = 0
    iterations: int = 0
    seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    note: str = ""

    @property
    def numel(self) -> int:
        """Weights in it."""
        return math.prod(self.shape)

    @property
    def gain(self) -> float:
        """Share of the plain error that is gone."""
        return 1 - self.error / self.error_plain if self.error_plain else 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields."""
        return dataclasses.asdict(self) | {"shape": list(self.shape), "trace": list(self.trace)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LayerReport:
        """The inverse of ``to_json``; unknown keys of later versions are dropped.

        Raises:
            InputError: a field is missing.
        """
        try:
            layer = cls(**_fields(cls, values))
        except (TypeError, AttributeError) as error:
            raise InputError(f"not a layer's report: {error}") from error
        if not layer.shape or min(layer.shape) < 1 or layer.rank < 0:
            raise InputError(f"not a layer's report: shape {layer.shape}, rank {layer.rank}")
        return layer


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log)); 0 if any is 0, NaN of nothing."""
    found = list(values)
    if not found:
        return math.nan
    return 0.0 if min(found) <= 0 else math.exp(math.fsum(map(math.log, found)) / len(found))


def total_error(layers: Sequence[LayerReport], errors: Iterable[float]) -> float:
    """sqrt(sum ||E||^2 / sum ||W||^2) over layers, from their relative errors."""
    whole = math.fsum(layer.weight_norm**2 for layer in layers)
    part = math.fsum((layer.weight_norm * error) ** 2 for layer, error in zip(layers, errors, strict=True))
    return math.sqrt(part / whole) if whole else 0.0


@dataclass(frozen=True)
class RunReport:
    """A whole run.

    Attributes:
        model: As it was given.
        command: The command line that made it, empty from Python.
        run: Options and input, as a resumed run compares them.
        save_format, dtype: Of what was written.
        layers: In the model's order.
        notes: What the user should know.
        versions: Of this package and of what computes.
        device: Where it was computed.
        seconds: Wall time of the run; after a resume, the sum over the layers and the last part.
        bytes_in, bytes_out: Of all weight files, before and after.
        adapter_bytes: Of the adapter's weights.
        peak_rss: Largest resident memory of the process, bytes.
    """

    model: str
    command: str
    run: dict[str, Any]
    save_format: str
    dtype: str
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    adapter_bytes: int = 0
    peak_rss: int = 0

    @property
    def totals(self) -> dict[str, Any]:
        """Sums and means over the layers."""
        numel = sum(layer.numel for layer in self.layers)
        stored = math.fsum(layer.bits_per_weight * layer.numel for layer in self.layers)
        plain = [layer.error_plain for layer in self.layers]
        solved = [layer.error for layer in self.layers]
        totals: dict[str, Any] = {
            "layers": len(self.layers),
            "weights": numel,
            "bits_per_weight": stored / numel if numel else 0.0,
            "error_plain_mean": geometric_mean(plain),
            "error_mean": geometric_mean(solved),
            "error_plain_total": total_error(self.layers, plain),
            "error_total": total_error(self.layers, solved),
            "solve_seconds": math.fsum(layer.seconds for layer in self.layers),
        }
        outputs = [
            (layer.output_error_plain, layer.output_error)
            for layer in self.layers
            if layer.output_error is not None and layer.output_error_plain is not None
        ]
        if outputs:
            totals["output_error_plain_mean"] = geometric_mean(before for before, _ in outputs)
            totals["output_error_mean"] = geometric_mean(after for _, after in outputs)
        return totals

    def worst(self, count: int = 5) -> list[LayerReport]:
        """The layers of the largest error, worst first."""
        return sorted(self.layers, key=lambda layer: (-layer.error, layer.name))[:count]

    def to_json(self) -> dict[str, Any]:
        """JSON-able: totals first, then the layers."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {"notes": list(self.notes), "layers": [layer.to_json() for layer in self.layers]}
        layers = values.pop("layers")
        return {"version": VERSION, **values, "totals": self.totals, "layers": layers}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunReport:
        """The inverse of ``to_json``.

        Raises:
            InputError: another version, or fields missing.
        """
        if values.get("version") != VERSION:
            raise InputError(f"report version {values.get('version')!r}; this reads version {VERSION}")
        try:
            layers = tuple(LayerReport.from_json(layer) for layer in values["layers"])
            return cls(**_fields(cls, {**values, "layers": layers}))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a report of this version: {error!r:.200}") from error

    def write(self, folder: Path) -> None:
        """Write ``report.json`` into ``folder``, atomically."""
        write_json(folder / REPORT_FILE, self.to_json())

    @classmethod
    def read(cls, folder: Path) -> RunReport:
        """The report of the run that wrote ``folder``.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        path = folder / REPORT_FILE
        if not path.is_file():
            raise InputError(f"{folder} has no {REPORT_FILE}")
        return cls.from_json(read_json_object(path))


def dumps(values: Any) -> str:
    """One line of JSON."""
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))
