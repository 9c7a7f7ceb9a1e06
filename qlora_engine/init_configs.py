"""Sub-configurations of LoraConfig: what an initialisation needs beside the rank."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

from quant.spec import QuantSpec

_FORMAT_OF_BITS = {2: "nf2", 3: "nf3", 4: "nf4", 8: "int8"}
_STARTS = ("zero", "svd")
_SCALES = ("absmax", "mse", "signed-mse")
_SVDS = ("fast", "exact")

T = TypeVar("T")


@dataclass
class LoraRuntimeConfig:
    """Settings of this process only; never written to disk.

    Attributes:
        ephemeral_gpu_offload: PEFT's.
        compute: "fp8": the products with all quantised Linears of the model in float8, "same": in the input's
            dtype; None: as they are. See ``qlora_engine.set_compute``.
    """

    ephemeral_gpu_offload: bool = False
    compute: str | None = None


@dataclass
class LoftQConfig:
    """How ``init_lora_weights="loftq"`` quantises the base and solves for the factors.

    Args:
        loftq_bits: 2, 3, 4 or 8. Chooses nf2, nf3, nf4 or int8 unless ``format`` is given.
        loftq_iter: Alternations of quantising and fitting, at least 1 (1 is PEFT's default, 5 the paper's).
        format: A name of ``quant.formats.names()``; its width wins over ``loftq_bits``.
        block_size: Consecutive weights that share a scale.
        double_quant: Quantise the scales too; the codes are chosen against the scales as stored.
        scales: ``"absmax"``, ``"mse"`` or ``"signed-mse"`` (a search: less error, same storage).
        start: ``"zero"`` (LoftQ) or ``"svd"`` (start from the SVD of the weight, QPiSSA).
        bits_pattern: Module-name regex -> bits (int) or format name; first match wins, as in rank_pattern.
        svd: ``"fast"`` (residual within 1.001 of the best) or ``"exact"``.
        seed: Of the fast SVD's random start.
        method: The solver, a name of ``qlora_engine.inits.names()`` that quantises. "": "recipe" with a
            calibration, else "loftq".
        calibration: What a solver that looks at inputs needs, and ``texts.load_texts`` reads: a path of
            texts, an iterable of strings or token ids, a DataLoader of tokenised batches. Or what calibrating
            gave: a ``Calibration``, the path of a saved one (.safetensors), {module path: second moment}.
        tokenizer: For texts; None: the one that lies beside the model's weights.
        calibration_windows: At most so many windows of text are read.
        window: Tokens of each; None: what model and tokenizer take, at most 1024.
        propagate: Run the texts through blocks that are quantised already, so that later layers undo some of
            the error before them; every layer is solved twice. Errors are then those of the targets that
            this gives, which are not the original weights.
        damping: Share of its mean that is added to the diagonal of a second moment.

    Raises:
        ValueError: a value out of range.

    Source: Li et al. 2023, arXiv:2310.08659; the first two fields have the PEFT library's names and defaults.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1
    format: str | None = None
    block_size: int = 64
    double_quant: bool = False
    scales: str = "absmax"
    start: str = "zero"
    bits_pattern: dict[str, int | str] = field(default_factory=dict)
    svd: str = "fast"
    seed: int = 0
    method: str = ""
    calibration: Any = None
    tokenizer: Any = None
    calibration_windows: int = 64
    window: int | None = None
    propagate: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.format is None and self.loftq_bits not in _FORMAT_OF_BITS:
            raise ValueError(f"loftq_bits={self.loftq_bits!r}; allowed: {sorted(_FORMAT_OF_BITS)}")
        if not isinstance(self.loftq_iter, int) or self.loftq_iter < 1:
            raise ValueError(f"loftq_iter={self.loftq_iter!r}; it must be a positive integer")
        for name, allowed in (("start", _STARTS), ("scales", _SCALES), ("svd", _SVDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if not self.method:
            self.method = "loftq" if self.calibration is None else "recipe"
        if self.bits_pattern is None:
            self.bits_pattern = {}
        for key, value in self.bits_pattern.items():
            if not isinstance(value, str) and value not in _FORMAT_OF_BITS:
                raise ValueError(
                    f"bits_pattern[{key!r}]={value!r}; allowed: {sorted(_FORMAT_OF_BITS)} or a format"
                )
        for bits in (None, *self.bits_pattern.values()):
            self.spec(bits)  # refuses unknown formats and block sizes

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoftQConfig:
        """The config that ``values`` describes; missing fields take their defaults.

        Raises:
            ValueError: unknown field, or a value out of range.
        """
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown field(s) in loftq_config: {', '.join(unknown)}")
        return cls(**values)

    def spec(self, pattern_value: int | str | None = None) -> QuantSpec:
        """The quantisation of a module; ``pattern_value`` is what ``bits_pattern`` says about it."""
        if pattern_value is None:
            format_name = self.format or _FORMAT_OF_BITS[self.loftq_bits]
        elif isinstance(pattern_value, str):
            format_name = pattern_value
        else:
            format_name = _FORMAT_OF_BITS[pattern_value]
        return QuantSpec(format=format_name, block_size=self.block_size, double_quant=self.double_quant)


@dataclass
class EvaConfig:
    """Data-driven A from the activations' right-singular vectors (Paischer et al., arXiv:2410.07170).

    Args:
        rho: Largest rank of a layer, as a multiple of r, when ranks are redistributed; at least 1.
        tau: Cosine similarity of successive singular vectors above which a layer counts as converged.
        use_label_mask, label_mask_value: Leave out tokens whose label has this value.
        whiten: Divide the vectors by their singular values.
        adjust_scaling_factors: Rescale alpha where a rank changed, so that gradients keep their scale.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1.0:
            raise ValueError("`rho` must be >= 1.0")
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError("`tau` must be between 0.0 and 1.0.")


@dataclass
class CordaConfig:
    """Kept so that such a file loads and saves unchanged; the method itself is not offered."""

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@dataclass
class LoraGAConfig:
    """Kept so that such a file loads and saves unchanged; the method itself is not offered."""

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16


def as_subconfig(value: Any, cls: type[T]) -> T | None:
    """``value`` as ``cls``: None, an instance, or the dict that a JSON file holds.

    Raises:
        TypeError: anything else.
    """
    if value is None or isinstance(value, cls):
        return value
    if isinstance(value, dict):
        return cls(**value)
    raise TypeError(f"`{cls.__name__}` must be a `{cls.__name__}`, a dict, or None.")
