"""``add_weighted_adapter``: a new adapter that combines others.

What an adapter adds to a layer's weight is ``s B A`` for LoRA and ``(g - 1) W + g s B A`` for DoRA, with
``g = magnitude / ||W + s B A||`` by output row. A weighted sum of such contributions is again of that form:
with ``c = 1 + sum w (g - 1)``

    W + sum w ((g - 1) W + g s B A) = diag(c) (W + sum w s diag(g / c) B A)

so DoRA adapters are combined exactly, too, by giving each B the row factors ``g / c`` and the new adapter
the magnitude ``c ||W + D||``, where D is what the combined factors make. Everything is computed before the
model is touched: an error leaves nothing behind.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .auxiliary import ModulesToSaveWrapper
from .combine import COMBINATION_TYPES, ELEMENTWISE, PRUNING, Factors, combine_factors, pad_rank
from .config import LoraConfig
from .dora import adapted_norm
from .layer_merge import dora_gain
from .lora_layer import LoraLayer
from .task_vectors import MajoritySign
from .trainable_tokens import TrainableTokensWrapper

# Row factors of W below this are lifted to it: a row that vanishes cannot be scaled back up.
_SMALLEST_ROW = 1e-6


@dataclass(frozen=True)
class _Combined:
    """The combined adapter of one layer, ready to be written."""

    A: Tensor  # as get_factors' A: (rank, in), flattened
    B: Tensor  # (out, rank / groups)
    bias: Tensor | None
    rows: Tensor | None  # c of the module docstring, (out,); None without DoRA


@torch.no_grad()
def add_weighted_adapter(
    tuner: Any,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: MajoritySign = "total",
) -> None:
    """Add the adapter ``adapter_name``, a combination of ``adapters``; it is neither active nor trainable.

    Its scaling is 1 in every layer (those of the sources are folded in), it has no rank or alpha pattern
    and no initialisation that would change the base. DoRA magnitudes and lora_B biases are combined, too. A
    module that one adapter trains in full (modules_to_save) is copied from it, whatever its weight; trained
    token rows are combined as changes of the base's rows.

    Args:
        tuner: LoraModel.
        adapters: Names of the adapters to combine.
        weights: One finite number an adapter, negative ones too.
        adapter_name: Name of the new one.
        combination_type: See ``combine.combine_factors``. A single adapter is always combined linearly,
            which is exact then. ``linear`` and the types that prune A and B apart have cross terms between
            adapters; ``cat`` and ``svd`` (at sufficient rank) are exact.
        svd_rank: Rank for ``svd`` and ``..._svd``; default: the largest of the sources.
        svd_clamp: Quantile in [0, 1] beyond which the entries of both factors of an SVD are clamped.
        svd_full_matrices: PEFT's argument, without effect: the factors of an SVD are always thin here.
        svd_driver: PEFT's argument, without effect for the same reason: the SVD is of a small core.
        density: Share of entries that pruning keeps.
        majority_sign_method: "total" or "frequency", for ties.

    Raises:
        ValueError: ``adapters`` and ``weights`` differ in length, a weight is not finite, the name exists, an
            adapter does not exist or targets parameters, two of them train the same module in full or
            tokens of different layers, ranks differ where they must not, an argument is missing or out of
            range.
        TypeError: ``target_modules`` of another type than PEFT has.
    """
    names, weights = list(adapters), [float(weight) for weight in weights]
    combination_type = _check_arguments(
        tuner,
        names,
        weights,
        adapter_name,
        combination_type,
        svd_rank,
        svd_clamp,
        density,
        majority_sign_method,
    )
    config = _combined_config(tuner, names, combination_type, svd_rank)
    layers = {
        name: layer
        for name, layer in tuner.model.named_modules()
        if isinstance(layer, LoraLayer) and any(layer.has_adapter(adapter) for adapter in names)
    }
    if not layers:
        raise ValueError("No matching LoRAs found. Please raise an issue on GitHub.")
    settings: dict[str, Any] = {
        "density": density,
        "majority_sign_method": majority_sign_method,
        "svd_clamp": svd_clamp,
    }
    combined = {}
    for path, layer in layers.items():
        try:
            combined[path] = _combine_layer(layer, names, weights, combination_type, config.r, settings)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
        for path, result in combined.items():
            _write(layers[path], adapter_name, result)
        _write_extra(tuner.model, names, weights, adapter_name)
        tuner.set_requires_grad(adapter_name, requires_grad=False)
    except Exception:
        tuner.delete_adapter(adapter_name)
        raise


def _check_arguments(
    tuner: Any,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str,
    svd_rank: int | None,
    svd_clamp: float | None,
    density: float | None,
    majority_sign_method: str,
) -> str:
    """The combination type to use; raises as ``add_weighted_adapter`` says."""
    if adapter_name in tuner.peft_config:
        raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
    if not adapters:
        raise ValueError(f"Found no adapter matching the names in {adapters}")
    for adapter in adapters:
        if adapter not in tuner.peft_config:
            raise ValueError(f"Adapter {adapter} does not exist")
    if len(adapters) != len(weights):
        raise ValueError(f"got {len(adapters)} adapters and {len(weights)} weights; give one weight for each")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be finite numbers, got {weights}")
    for adapter in adapters:
        if tuner.peft_config[adapter].target_parameters:
            raise ValueError(
                "add_weighted_adapter does not support targeting nn.Parameter (problematic adapter "
                f"'{adapter}')"
            )
    both = [
        wrapper
        for wrapper in tuner.modules()
        if isinstance(wrapper, ModulesToSaveWrapper)
        and sum(adapter in wrapper.modules_to_save for adapter in set(adapters)) > 1
    ]
    if both:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(both)} such instance(s)."
        )
    if combination_type not in COMBINATION_TYPES:
        raise ValueError(f"Invalid combination_type: {combination_type}")
    if len(adapters) == 1 and combination_type != "linear":
        if svd_rank is not None:
            warnings.warn(
                "svd_rank has no effect on a single adapter, which is combined linearly.", stacklevel=3
            )
        combination_type = "linear"
    if combination_type in PRUNING:
        if density is None:
            raise ValueError(f"combination_type={combination_type!r} needs a density in [0, 1], got None")
        if density < 0:
            raise ValueError(f"Density should be >= 0, got {density}")
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method={majority_sign_method!r}; allowed: 'total', 'frequency'")
    if svd_rank is not None and svd_rank < 1:
        raise ValueError(f"svd_rank must be at least 1, got {svd_rank}")
    if svd_clamp is not None and not 0 <= svd_clamp <= 1:
        raise ValueError(f"svd_clamp is a quantile in [0, 1], got {svd_clamp}")
    return combination_type


def _combined_config(
    tuner: Any, adapters: list[str], combination_type: str, svd_rank: int | None
) -> LoraConfig:
    configs = [tuner.peft_config[adapter] for adapter in adapters]
    ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in configs]
    if combination_type in ELEMENTWISE:
        if len(set(ranks)) > 1:
            raise ValueError(
                "All adapters must have the same r value when using combination_type linear, ties, "
                "dare_ties or dare_linear."
            )
        rank = ranks[0]
    elif combination_type == "cat":
        rank = sum(ranks)
    else:
        rank = svd_rank or max(ranks)
    use_dora = any(config.use_dora for config in configs)
    lora_bias = any(config.lora_bias for config in configs)
    if use_dora and lora_bias:
        raise ValueError("adapters with use_dora and adapters with lora_bias cannot be combined")
    trained = [name for name, config in zip(adapters, configs) if config.bias != "none"]
    if trained:
        warnings.warn(
            f"The biases that {', '.join(trained)} trained are the base model's now. They stay in effect, "
            "but are not part of the new adapter and will not be saved with it.",
            stacklevel=3,
        )
    modules_to_save = [name for config in configs for name in config.modules_to_save or ()]
    return replace(
        configs[0],
        r=rank,
        lora_alpha=rank,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        use_dora=use_dora,
        lora_bias=lora_bias,
        bias="none",
        modules_to_save=list(dict.fromkeys(modules_to_save)) or None,
        trainable_token_indices=_union_of_tokens(configs),
        init_lora_weights=True,
        loftq_config={},
        eva_config=None,
        corda_config=None,
        lora_ga_config=None,
        **_targets(tuner, adapters, configs),
    )


def _targets(tuner: Any, adapters: list[str], configs: list[LoraConfig]) -> dict[str, Any]:
    """The fields that choose modules: the union of what the adapters have."""
    kinds = {type(config.target_modules) for config in configs}
    if len(kinds) > 1:
        raise ValueError(
            "all adapter configs should follow the same target modules type. Combining adapters with "
            "`target_modules` type being a mix of list/set and string is not supported."
        )
    filters = [(c.exclude_modules, c.layers_to_transform, c.layers_pattern) for c in configs]
    if any(chosen != filters[0] for chosen in filters):
        names = {
            path
            for path, layer in tuner.model.named_modules()
            if isinstance(layer, LoraLayer) and any(layer.has_adapter(adapter) for adapter in adapters)
        }
        return {
            "target_modules": names,
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
    if kinds == {str}:
        return {"target_modules": "|".join(f"({config.target_modules})" for config in configs)}
    if kinds == {set}:
        return {"target_modules": set().union(*(cast("set[str]", c.target_modules) for c in configs))}
    raise TypeError(f"Invalid type {kinds.pop()} found in target_modules")


def _union_of_tokens(configs: list[LoraConfig]) -> list[int] | dict[str, list[int]] | None:
    wanted = [c.trainable_token_indices for c in configs if c.trainable_token_indices is not None]
    if not wanted:
        return None
    if all(isinstance(tokens, list) for tokens in wanted):
        return sorted({token for tokens in wanted for token in cast("list[int]", tokens)})
    if not all(isinstance(tokens, dict) for tokens in wanted):
        raise ValueError(
            "trainable_token_indices must be a list in all adapters or a dict in all of them to be combined"
        )
    union: dict[str, list[int]] = {}
    for tokens in wanted:
        for name, indices in cast("dict[str, list[int]]", tokens).items():
            union[name] = sorted({*union.get(name, []), *indices})
    return union


def _combine_layer(
    layer: LoraLayer,
    adapters: list[str],
    weights: list[float],
    combination_type: str,
    rank: int,
    settings: dict[str, Any],
) -> _Combined:
    present = [(name, weight) for name, weight in zip(adapters, weights) if layer.has_adapter(name)]
    groups = getattr(layer.get_base_layer(), "groups", 1)
    if rank % groups:
        raise ValueError(f"the combined rank {rank} is not divisible by the convolution's {groups} groups")
    rows = _rows_of_base(layer, present)
    factors = []
    for name, weight in present:
        A, B = (
            factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in layer.get_factors(name)
        )
        if rows is not None and layer.use_dora.get(name, False):
            B = (dora_gain(layer, name).to(B) / rows.to(B)).unsqueeze(1) * B
        elif rows is not None:
            B = B / rows.to(B).unsqueeze(1)
        A = A.reshape(groups, -1, A.shape[1])  # (groups, r / groups, in)
        B = B.reshape(groups, -1, B.shape[1])  # (groups, out / groups, r / groups)
        factors.append(Factors(A, B, float(layer.scaling[name]), weight))
    if combination_type in ELEMENTWISE and len({f.rank for f in factors}) > 1:
        raise ValueError(
            f"adapters {', '.join(name for name, _ in present)} have ranks "
            f"{', '.join(str(groups * f.rank) for f in factors)} here; "
            f"combination_type={combination_type!r} needs "
            "equal ones"
        )
    own_rank = factors[0].rank if combination_type in ELEMENTWISE else rank // groups
    if combination_type == "cat":
        own_rank = sum(f.rank for f in factors)
    A, B = combine_factors(combination_type, factors, own_rank, **settings)
    A, B = pad_rank(A, rank // groups, dim=1), pad_rank(B, rank // groups, dim=2)
    bias: Tensor | None = None
    for name, weight in present:
        if layer.lora_bias.get(name, False):
            own = weight * float(layer.scaling[name]) * layer.lora_B[name].bias.detach().float()
            bias = own if bias is None else bias + own
    return _Combined(A.flatten(0, 1), B.flatten(0, 1), bias, rows)


def _rows_of_base(layer: LoraLayer, present: Sequence[tuple[str, float]]) -> Tensor | None:
    """``c`` of the module docstring, float32 (out,), or None where no adapter is a DoRA one."""
    with_dora = [(name, weight) for name, weight in present if layer.use_dora.get(name, False)]
    if not with_dora:
        return None
    if layer.merged:
        raise ValueError("DoRA adapters cannot be combined while an adapter is merged; unmerge first")
    rows = torch.stack([weight * (dora_gain(layer, name) - 1) for name, weight in with_dora]).sum(0) + 1
    return torch.where(rows.abs() < _SMALLEST_ROW, _SMALLEST_ROW, rows)


def _write(layer: LoraLayer, adapter: str, combined: _Combined) -> None:
    for own, value in zip(layer.get_factors(adapter), (combined.A, combined.B)):
        own.data.copy_(value)
    if layer.lora_bias.get(adapter, False):
        bias = layer.lora_B[adapter].bias.data
        bias.zero_() if combined.bias is None else bias.copy_(combined.bias)
    if layer.use_dora.get(adapter, False):
        A, B = (factor.detach() for factor in layer.get_factors(adapter))
        transposed = layer.fan_in_fan_out or adapter in layer.lora_embedding_A
        norm = adapted_norm(layer.get_base_layer(), A, B, layer.scaling[adapter], transposed=transposed)
        magnitude = norm if combined.rows is None else combined.rows.to(norm) * norm
        layer.lora_magnitude_vector[adapter].weight.data.copy_(layer._shape_norm(magnitude))


def _write_extra(model: nn.Module, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """Modules that train in full, and trained token rows."""
    for wrapper in _wrappers(model):
        if isinstance(wrapper, ModulesToSaveWrapper):
            source = next((name for name in adapters if name in wrapper.modules_to_save), None)
            if source is not None:
                state = wrapper.modules_to_save[source].state_dict()
                wrapper.modules_to_save[adapter_name].load_state_dict(state)
        elif wrapper.token_adapter.tied_adapter is None:
            _write_tokens(wrapper.token_adapter, adapters, weights, adapter_name)


def _wrappers(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, (ModulesToSaveWrapper, TrainableTokensWrapper)):
            yield module


def _write_tokens(layer: Any, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    rows: Tensor = layer.trainable_tokens_delta[adapter_name].data  # (n, dim), the base's rows
    position = {token: i for i, token in enumerate(layer.token_indices[adapter_name])}
    base = rows.clone()
    for name, weight in zip(adapters, weights):
        if name in layer.trainable_tokens_delta:
            index = torch.tensor([position[token] for token in layer.token_indices[name]], device=rows.device)
            change = layer.trainable_tokens_delta[name].data.to(rows) - base[index]
            rows.index_add_(0, index, change, alpha=weight)
