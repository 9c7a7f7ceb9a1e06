"""What a user can choose for ``loftq-init``, checked once, as one frozen value."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quant import QuantSpec, formats
from quant.tensor import SCALE_RULES

from . import inits
from .checkpoint import parse_size
from .errors import InputError, did_you_mean
from .lowrank import SVD_METHODS

FORMAT_OF_BITS = {2: "nf2", 3: "nf3", 4: "nf4", 8: "int8"}
SAVE_FORMATS = ("auto", "bnb", "native", "dense")
DTYPES = ("auto", "float16", "bfloat16", "float32")
MAX_ALPHA = 1 << 53  # what a file of an adapter may hold, as a number that float32 can multiply with


def init_methods() -> list[str]:
    """The initialisations that quantise the base."""
    return [name for name in inits.names() if inits.get(name).quantizes]


def default_iters(method: str) -> int:
    """Alternations where none were asked for: five as in LoftQ's paper, four of the dearer recipe."""
    return 4 if method == "recipe" else 5


def choice(option: str, value: str, allowed: Iterable[str]) -> str:
    """``value`` if it is one of ``allowed``.

    Raises:
        InputError: naming what is allowed.
    """
    allowed = list(allowed)
    if value not in allowed:
        raise InputError(
            f"{option} {value!r}{did_you_mean(str(value), allowed)}; allowed: {', '.join(allowed)}"
        )
    return value


def parse_width(text: str | int) -> tuple[str, int | None, bool | None]:
    """Format, block size and double quantisation from ``4``, ``"nf4"``, ``"int8/128"`` or
    ``"nf3/64/double"``.

    What is not said is None.

    Raises:
        InputError: unknown width or format, a block size that is no number, or another third part.
    """
    name, _, rest = str(text).partition("/")
    block, _, nested = rest.partition("/")
    if nested:
        choice("double quantisation", nested, ("double", "plain"))
    if name.isdecimal():
        if int(name) not in FORMAT_OF_BITS:
            raise InputError(f"{name} bits; allowed: {', '.join(map(str, FORMAT_OF_BITS))}")
        name = FORMAT_OF_BITS[int(name)]
    choice("format", name, formats.names())
    if block and not block.isdecimal():
        raise InputError(f"block size {block!r} in {text!r} is not a number")
    return name, int(block) if block else None, (nested == "double") if nested else None


@dataclass(frozen=True)
class InitOptions:
    """Options of a run. Those that do not change the output's bytes are not here.

    Attributes:
        method: One of ``init_methods()``.
        format, block_size, double_quant: Of every quantised weight that ``bits_pattern`` does not name.
        bits_pattern: Module-name regex -> width, format, "format/block size" or "format/block size/double"
            (or "/plain"); the first match wins.
        rank: Of every adapter that ``rank_pattern`` does not name.
        alpha: lora_alpha; None: the rank, which is a scaling of 1.
        rslora: Scaling is alpha / sqrt(rank).
        rank_pattern, alpha_pattern: As in LoraConfig.
        iters, scales, svd, seed, damping: Of the solver.
        propagate: Solve the layers one behind the other, each for what the texts bring it then.
        together: Solve layers of one shape together: more memory, equal up to rounding, and the bytes then
            depend on the memory that is free.
        target_modules: Names, one regex, or "all-linear".
        exclude_modules: Names or one regex.
        target_parameters: Stacked experts that get an adapter, by the names of their Parameters.
        quantize_rest: Quantise the Linears without an adapter too.
        quantize_experts: Quantise stacked experts; None: where the native format is saved anyway.
        dtype: Of the model: what is not quantised is converted to it; "auto" leaves it as it is.
        adapter_dtype: Of A and B.
        max_shard_size: Bytes of a weight file.
        save_format: "bnb", "native", "dense", or "auto": bnb where it can hold every weight, else native.
        trust_remote_code: Let Python files of the model run.

    Raises:
        InputError: a value that is not allowed, naming it and what is.
    """

    method: str = "loftq"
    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = False
    bits_pattern: Mapping[str, str | int] = field(default_factory=dict)
    rank: int = 16
    alpha: float | None = None
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    iters: int = 5
    scales: str = "absmax"
    svd: str = "fast"
    seed: int = 0
    damping: float = 0.01
    propagate: bool = False
    together: bool = False
    target_modules: tuple[str, ...] | str = "all-linear"
    exclude_modules: tuple[str, ...] | str = ()
    target_parameters: tuple[str, ...] = ()
    quantize_rest: bool = False
    quantize_experts: bool | None = None
    dtype: str = "auto"
    adapter_dtype: str = "float32"
    max_shard_size: int = 5_000_000_000
    save_format: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        choice("method", self.method, init_methods())
        choice("scales", self.scales, SCALE_RULES)
        choice("svd", self.svd, SVD_METHODS)
        choice("save-format", self.save_format, SAVE_FORMATS)
        choice("dtype", self.dtype, DTYPES)
        choice("adapter-dtype", self.adapter_dtype, DTYPES[1:])
        choice("format", self.format, formats.names())
        object.__setattr__(self, "max_shard_size", parse_size(self.max_shard_size))
        for name, ranks in (("rank", {"": self.rank}), ("rank-pattern", self.rank_pattern)):
            for key, rank in ranks.items():
                if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                    raise InputError(
                        f"{name} {key and key + '='}{rank!r}; a rank is an integer of at least 1"
                    )
        alphas = {"": 1 if self.alpha is None else self.alpha}
        for name, values in (("alpha", alphas), ("alpha-pattern", self.alpha_pattern)):
            for key, alpha in values.items():
                if (
                    isinstance(alpha, bool)
                    or not isinstance(alpha, (int, float))
                    or not 0 < alpha < MAX_ALPHA
                ):
                    raise InputError(
                        f"{name} {key and key + '='}{alpha!r}; it must be a positive number below 2**53"
                    )
        if isinstance(self.iters, bool) or not isinstance(self.iters, int) or self.iters < 1:
            raise InputError(f"iters {self.iters!r}; it must be an integer of at least 1")
        if not 0 <= self.damping < float("inf"):
            raise InputError(f"damping {self.damping!r}; it must not be negative")
        self._check_regexes()
        for width in ("", *self.bits_pattern):
            self.spec_for(width)

    def _check_regexes(self) -> None:
        given = [*self.bits_pattern, *self.rank_pattern, *self.alpha_pattern]
        given += [value for value in (self.target_modules, self.exclude_modules) if isinstance(value, str)]
        for pattern in given:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"{pattern!r} is not a regular expression: {error}") from error

    def spec_for(self, pattern: str) -> QuantSpec:
        """The spec of what the key ``pattern`` of ``bits_pattern`` names; any other key: the default."""
        name, block, nested = parse_width(self.bits_pattern.get(pattern, self.format))
        try:
            return QuantSpec(name, block or self.block_size, self.double_quant if nested is None else nested)
        except (ValueError, TypeError) as error:
            raise InputError(str(error)) from error

    @property
    def lora_alpha(self) -> float:
        """Alpha of modules that ``alpha_pattern`` does not name; an int where it is a whole number."""
        alpha = self.rank if self.alpha is None else self.alpha
        return int(alpha) if alpha == int(alpha) else alpha

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
