"""Initialise one adapter of one layer, and quantise the layer's base where the method does that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant.linear import QuantEmbedding, QuantizedModule, QuantLinear
from quant.spec import QuantSpec
from quant.tensor import QuantizedTensor

from .base_weight import dense_weight, is_conv1d, is_quantized, store_weight
from .calibrated_model import check_moment, layer_moment
from .config import LoftQConfig, LoraConfig
from .inits import Initialised, embedding_factors, get, initialise
from .lowrank import check_rank
from .targets import pattern_value

if TYPE_CHECKING:
    from .lora_layer import LoraLayer


@dataclass(frozen=True)
class InitRecord:
    """What an initialisation from the weight did to one layer.

    Attributes:
        name: Path of the module.
        method: Name of the initialisation.
        spec: Format of the base, None where it stayed dense.
        rank, scaling: Of the adapter.
        error_plain: Relative Frobenius error of plain quantisation, None where nothing was quantised.
        error: That of the stored base plus the stored, scaled factors.
        trace: Objective by iteration.
        seconds: Wall time.
        output_error_plain, output_error: The same of the layer's output; None without a second moment.
        note: What is unusual about this layer.
    """

    name: str
    method: str
    spec: QuantSpec | None
    rank: int
    scaling: float
    error_plain: float | None
    error: float
    trace: tuple[float, ...]
    seconds: float
    output_error_plain: float | None = None
    output_error: float | None = None
    note: str = ""


def initialise_adapter(layer: LoraLayer, adapter: str, config: LoraConfig, name: str) -> None:
    """Fill the factors of ``adapter`` as ``config.init_lora_weights`` says; may replace the layer's base.

    Factors on the meta device are left alone: they wait for a checkpoint.

    Raises:
        ValueError: unknown method, or one that this layer, its rank or its base does not allow.
    """
    init = config.init_lora_weights
    A, _ = layer.get_factors(adapter)
    if isinstance(init, str) and init.lower() == "mica":
        _freeze_B(layer, adapter)
    if isinstance(init, bool) or A.is_meta:
        layer.reset_lora_parameters(adapter, init if isinstance(init, bool) else True)
        return
    kind = init.lower() if isinstance(init, str) else init
    if init == "loftq":
        _initialise_loftq(layer, adapter, config, name)
    elif isinstance(init, str) and (init.startswith("pissa") or kind == "olora"):
        _initialise_from_weight(layer, adapter, init if init.startswith("pissa") else "olora", name)
    elif init == "eva" and adapter in layer.lora_B:
        nn.init.zeros_(layer.lora_B[adapter].weight)
    elif init == "orthogonal":
        _initialise_orthogonal(layer, adapter, name)
    elif kind == "mica":
        _initialise_mica(layer, adapter)
    elif init == "eva":
        layer.reset_lora_parameters(adapter, True)
    else:
        layer.reset_lora_parameters(adapter, init)  # "gaussian", or the error for an unknown name


def _base_matrix(layer: LoraLayer) -> Tensor:
    """The base weight as (out, in); an embedding's as it lies, (rows, width)."""
    weight = dense_weight(layer.get_base_layer())
    return weight.t() if layer.fan_in_fan_out and not _is_embedding(layer) else weight


def _is_embedding(layer: LoraLayer) -> bool:
    return isinstance(layer.get_base_layer(), (nn.Embedding, QuantEmbedding))


def _factor_dtype(weight: Tensor) -> torch.dtype:
    return weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float32


def _record(layer: LoraLayer, adapter: str, name: str, result: Initialised, note: str = "") -> None:
    spec = result.base.spec if isinstance(result.base, QuantizedTensor) else None
    layer.init_records[adapter] = InitRecord(
        name=name,
        method=result.method,
        spec=spec,
        rank=result.rank,
        scaling=result.scaling,
        error_plain=result.error_plain,
        error=result.error,
        trace=result.trace,
        seconds=result.seconds,
        output_error_plain=result.output_error_plain,
        output_error=result.output_error,
        note=note,
    )


def _set_factors(layer: LoraLayer, adapter: str, A: Tensor, B: Tensor) -> None:
    if _is_embedding(layer):
        A, B = embedding_factors(A, B)
        layer.lora_embedding_A[adapter].data = A
        layer.lora_embedding_B[adapter].data = B
    else:
        layer.lora_A[adapter].weight.data = A.reshape(layer.lora_A[adapter].weight.shape)
        layer.lora_B[adapter].weight.data = B.reshape(layer.lora_B[adapter].weight.shape)


def _options(layer: LoraLayer, name: str) -> dict[str, Any]:
    return {"kind": "embedding" if _is_embedding(layer) else "linear", "name": name or None}


def check_loftq(base: nn.Module, rank: int, config: LoraConfig, name: str) -> None:
    """Refuse, before anything is changed, a layer that cannot be quantised and solved for.

    Raises:
        ValueError: a layer of another kind, quantised already, too small for the rank, or not calibrated.
    """
    settings = LoftQConfig.from_dict(config.loftq_config)  # type: ignore[arg-type]
    title = f"'{name}' ({type(base).__name__})"
    if is_quantized(base):
        raise ValueError(
            f"init_lora_weights='loftq' needs the full-precision weight, but {title} is quantised already; "
            "load the original model, or use init_lora_weights=True and replace_lora_weights_loftq"
        )
    if not isinstance(base, (nn.Linear, nn.Embedding)) and not is_conv1d(base):
        raise ValueError(f"init_lora_weights='loftq' works on Linear, Conv1D and Embedding, not on {title}")
    if isinstance(base, nn.Embedding) and base.max_norm is not None:
        raise ValueError(f"an embedding with max_norm changes its weight and cannot be quantised: {title}")
    check_rank(rank, dense_weight(base).shape, name or None)
    if get(settings.method).needs_hessian:
        if settings.calibration is None:
            raise ValueError(
                f"method={settings.method!r} needs LoftQConfig(calibration=...): texts to look at"
            )
        check_moment(settings.calibration, name, base)


def _initialise_loftq(layer: LoraLayer, adapter: str, config: LoraConfig, name: str) -> None:
    settings = LoftQConfig.from_dict(config.loftq_config)  # type: ignore[arg-type]
    base = layer.get_base_layer()
    check_loftq(base, layer.r[adapter], config, name)
    spec = settings.spec(pattern_value(settings.bits_pattern, name, None, field_name="bits_pattern"))
    weight = _base_matrix(layer)
    options = _options(layer, name)
    method, scales, note = settings.method, settings.scales, ""
    if get(method).needs_hessian:
        hessian, why = layer_moment(settings.calibration, name, base)
        if hessian is None:
            method, scales, note = "loftq", "signed-mse", f"solved by loftq, not {method}: {why}"
        options |= {"hessian": hessian, "damping": settings.damping}
    result = initialise(
        weight,
        method=method,
        rank=layer.r[adapter],
        spec=spec,
        scaling=layer.scaling[adapter],
        factor_dtype=_factor_dtype(weight),
        iters=settings.loftq_iter,
        scales=scales,
        svd=settings.svd,
        start=settings.start,
        seed=settings.seed,
        **options,
    )
    _set_factors(layer, adapter, result.A, result.B)
    _record(layer, adapter, name, result, note)
    assert isinstance(result.base, QuantizedTensor)
    replace_base(layer, quantized_module(base, result.base))


def quantized_module(module: nn.Module, q: QuantizedTensor) -> QuantizedModule:
    """The frozen quantised layer that takes the place of ``module``; a bias is the same Parameter."""
    if isinstance(module, nn.Embedding):
        scale = getattr(module, "embed_scale", None)
        new: QuantizedModule = QuantEmbedding.from_quantized(
            q, module.padding_idx, None if scale is None else float(scale)
        )
    else:
        new = QuantLinear.from_quantized(q, module.bias, conv1d=is_conv1d(module))  # type: ignore[arg-type]
    return new.train(module.training)


def replace_base(layer: LoraLayer, module: nn.Module) -> None:
    """Put ``module`` in the place of the layer's innermost base layer."""
    holder: Any = layer
    while hasattr(holder.base_layer, "base_layer"):
        holder = holder.base_layer
    holder.base_layer = module
    if isinstance(module, QuantLinear):
        layer.fan_in_fan_out = False  # stored (out, in), whatever it replaced


def _initialise_from_weight(layer: LoraLayer, adapter: str, method: str, name: str) -> None:
    base = layer.get_base_layer()
    if is_quantized(base) and method.startswith("pissa"):
        raise TypeError(
            "Please initialize PiSSA under float32, float16, or bfloat16: the residual of a weight that "
            "lies on a grid does not, and would have to be rounded again. Use init_lora_weights='loftq' "
            "with start='svd'."
        )
    weight = _base_matrix(layer)
    spec = base.spec if isinstance(base, QuantizedModule) else None
    options = _options(layer, name)
    if weight.dim() != 2 or options["kind"] == "embedding":
        raise ValueError(f"Unknown initialization init_lora_weights={method!r} for {type(base).__name__}")
    result = initialise(
        weight,
        method=method,
        rank=layer.r[adapter],
        spec=spec,
        scaling=layer.scaling[adapter],
        factor_dtype=_factor_dtype(weight),
        svd="exact",
        **options,
    )
    _set_factors(layer, adapter, result.A, result.B)
    _record(layer, adapter, name, result)
    if isinstance(result.base, QuantizedTensor) and isinstance(base, QuantizedModule):
        base.set_quantized(result.base)
    elif result.base is not None:
        residual: Tensor = result.base  # type: ignore[assignment]
        store_weight(base, residual.t().contiguous() if layer.fan_in_fan_out else residual)


def _initialise_mica(layer: LoraLayer, adapter: str) -> None:
    """B: the left singular vectors of the smallest singular values, frozen; A = 0 (arXiv:2604.01694)."""
    embedding = _is_embedding(layer)
    weight = dense_weight(layer.get_base_layer()).float()
    weight = weight.t() if embedding or layer.fan_in_fan_out else weight  # (out, in)
    rank = layer.r[adapter]
    if weight.dim() != 2 or rank > min(weight.shape):
        raise ValueError(
            f"MiCA requires `r` <= min(in_features, out_features) but got r={rank} for a layer with weight "
            f"shape {tuple(weight.shape)}."
        )
    U, _, _ = torch.linalg.svd(weight, full_matrices=False)
    A, B = layer.get_factors(adapter)
    A.data.zero_()
    B.data.copy_(U[:, -rank:])


def _freeze_B(layer: LoraLayer, adapter: str) -> None:
    attribute = "lora_embedding_B" if adapter in layer.lora_embedding_B else "lora_B"
    layer.frozen_peft_weight_names[adapter] = (attribute,)


def _initialise_orthogonal(layer: LoraLayer, adapter: str, name: str) -> None:
    rank = layer.r[adapter]
    if rank % 2:
        raise ValueError(f"Orthogonal initialization requires the LoRA rank to be even, got {rank} instead.")
    if adapter not in layer.lora_A:
        raise ValueError("Unknown initialization init_lora_weights='orthogonal' for an embedding")
    A, B = layer.get_factors(adapter)
    weight = torch.empty(B.shape[0], A.shape[1], device=A.device)
    weight.zero_()
    result = initialise(weight, method="orthogonal", rank=rank, seed=None, **_options(layer, name))
    _set_factors(layer, adapter, result.A, result.B)
