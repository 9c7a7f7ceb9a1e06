"""One weight that ``loftq-init`` quantises: how, and with which adapter."""

from __future__ import annotations

from dataclasses import dataclass

from quant import QuantSpec

from .architecture import ModuleInfo
from .errors import InputError
from .options import InitOptions
from .safetensors_io import TensorEntry
from .stored_expert import ExpertEntry
from .targets import pattern_value


@dataclass(frozen=True)
class LayerPlan:
    """One weight to quantise.

    Attributes:
        index: Position in the plan.
        module: Its module.
        entry: Its tensor on disk, or what makes one expert of several.
        spec: How it will be quantised.
        rank: Of its adapter; 0: none.
        alpha: lora_alpha of its adapter.
        scaling: PEFT's factor of the adapter's product.
    """

    index: int
    module: ModuleInfo
    entry: TensorEntry | ExpertEntry
    spec: QuantSpec
    rank: int
    alpha: float
    scaling: float

    @property
    def path(self) -> str:
        """Module path."""
        return self.module.path

    @property
    def numel(self) -> int:
        """Weights in it."""
        return self.entry.numel

    @property
    def stack(self) -> str | None:
        """Of an expert the stacked Parameter that it is in."""
        return self.entry.stack if isinstance(self.entry, ExpertEntry) else None

    def factor_bytes(self, element: int) -> int:
        """Bytes of A and B with ``element`` bytes an element."""
        return self.rank * sum(self.module.shape) * element


def plan_layer(
    index: int,
    module: ModuleInfo,
    entry: TensorEntry | ExpertEntry,
    spec: QuantSpec,
    options: InitOptions,
    *,
    is_adapted: bool,
) -> LayerPlan:
    """The plan of one weight. Patterns of ranks and alphas name its module, or the stack of an expert.

    Raises:
        InputError: the rank of its adapter is larger than the smaller side of its matrix.
    """
    stack = entry.stack if isinstance(entry, ExpertEntry) else None
    name = stack or module.path
    rank = pattern_value(dict(options.rank_pattern), name, options.rank, field_name="rank_pattern")
    alpha = pattern_value(dict(options.alpha_pattern), name, options.lora_alpha, field_name="alpha_pattern")
    if is_adapted and rank > min(module.shape):
        remedy = (
            "give its stack a smaller one with --rank-pattern"
            if stack
            else "give it a smaller one with --rank-pattern, or --exclude-modules"
        )
        raise InputError(
            f"rank {rank} is too large for '{module.path}' of shape {module.shape}: at most "
            f"{min(module.shape)} ({remedy})"
        )
    scaling = alpha / rank**0.5 if options.rslora else alpha / rank
    return LayerPlan(index, module, entry, spec, rank if is_adapted else 0, alpha, scaling)
