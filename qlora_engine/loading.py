"""Load a quantised checkpoint as a model with our layers, without bitsandbytes.

    model = from_pretrained("out")           # what loftq-init wrote, in any of its formats, or a dense model

Weights in bitsandbytes' layout and in the native one become QuantLinear and QuantEmbedding on the very
bytes of the file; the model is built without weights first, so that no dense weight of a quantised layer
ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant import QuantSpec
from quant.bnb_format import from_bnb, is_bnb
from quant.linear import QuantEmbedding, QuantLinear
from quant.linear_op import TENSOR_NAMES, as_quantized
from quant.tensor import QuantizedTensor

from .architecture import read_architecture
from .base_weight import is_conv1d
from .checkpoint import Checkpoint
from .compute import set_compute
from .errors import InputError, in_short
from .expert_stack import ExpertPlace, place_of, put_layer, settle_experts
from .hub import find_model
from .partial_model import PartialModel
from .safetensors_io import TORCH_DTYPES

NATIVE_METHOD = "qlora_engine"
NATIVE_VERSION = 1


def from_pretrained(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    compute: str = "same",
) -> Any:
    """A transformers model whose quantised weights are our layers.

    Args:
        name: A folder, or an id on the hub. Quantised by loftq-init or bitsandbytes (4-bit, or LLM.int8),
            or dense.
        dtype: Of everything that is not quantised; None: as config.json says.
        device: Where to put the model; None: the CPU.
        revision: Of a hub model.
        trust_remote_code: Let Python files that come with the model run.
        compute: "fp8": the products with quantised Linears in float8, see ``set_compute``.

    Returns:
        The model in eval mode, of the class that config.json names. Its quantised weights are frozen.

    Raises:
        InputError: not a model, or a tensor that is missing, broken or of another shape.
    """
    folder = find_model(str(name), revision=revision, code=trust_remote_code)
    checkpoint = Checkpoint.open(folder)
    wanted = dtype or _dtype_of(checkpoint)
    settings = checkpoint.config.get("quantization_config")
    if settings is None:
        known = read_architecture(folder, checkpoint.config, trust_remote_code=trust_remote_code)
        kind = type(known._model)
        try:
            model = kind.from_pretrained(folder, dtype=wanted, trust_remote_code=trust_remote_code)
        except RuntimeError as error:  # transformers': tensors of other shapes than config.json calls for
            raise InputError(
                f"{folder} does not hold what its config.json says: {in_short(error)}"
            ) from error
        except AttributeError as error:  # of transformers 5.0, which asks null for its method
            if "quantization_config" not in checkpoint.config:
                raise
            raise InputError(
                f"{folder} does not hold what its config.json says: quantization_config is null"
            ) from error
    else:
        model = _quantised(folder, checkpoint, settings, wanted, trust_remote_code)
    model = model.eval() if device is None else model.eval().to(device)
    set_compute(model, compute)
    return model


def _dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    dtype = getattr(torch, str(named), None)
    return dtype if isinstance(dtype, torch.dtype) else TORCH_DTYPES[checkpoint.float_dtype]


def check_quantised(folder: Path, settings: Any) -> None:
    """Refuse a ``quantization_config`` that this cannot read.

    Raises:
        InputError: another method, or a later version.
    """
    method = settings.get("quant_method") if isinstance(settings, dict) else repr(settings)
    if method not in (NATIVE_METHOD, "bitsandbytes"):
        raise InputError(
            f"{folder} is quantised with {method!r:.60}; readable: bitsandbytes, {NATIVE_METHOD} or dense"
        )
    if method == NATIVE_METHOD and newer_than_known(settings):
        raise InputError(
            f"{folder} has version {settings.get('version')!r:.20} of the native format; known: "
            f"{NATIVE_VERSION}"
        )


def not_quantised(model: nn.Module, quantised: Collection[str]) -> list[str]:
    """Names of the parameters and buffers of ``model`` but for the weights of the modules ``quantised``."""
    names = [*model.state_dict(), *(name for name, _ in model.named_buffers())]
    return [
        name
        for name in dict.fromkeys(names)
        if (name.rpartition(".")[0] not in quantised or name.rpartition(".")[2] != "weight")
        and f"{name}.0" not in quantised
    ]


def _quantised(
    folder: Path, checkpoint: Checkpoint, settings: Any, dtype: torch.dtype, trust_remote_code: bool
) -> Any:
    check_quantised(folder, settings)
    partial = PartialModel(folder, dtype=dtype, trust_remote_code=trust_remote_code, quantised=True)
    model = partial.model
    modules = dict(model.named_modules())
    found = {path: read() for path, read in stored_weights(checkpoint, settings, partial, modules)}
    partial.load(not_quantised(model, found))
    specs: dict[str, QuantSpec] = {}
    for path, q in found.items():
        place = place_of(modules, path)
        put_layer(model, path, _layer(place or modules[path], q), place)
        specs[path] = q.spec
    settle_experts(model)
    model.config.quantization_config = native_config(specs)
    read_generation_config(model, folder)
    return model


def read_generation_config(model: Any, folder: Path) -> None:
    """Give ``model`` the generation_config.json of ``folder``, if there is one."""
    generation = folder / "generation_config.json"
    if generation.is_file() and hasattr(model, "generation_config"):
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)


def native_config(specs: Mapping[str, QuantSpec]) -> dict[str, Any]:
    """config.json's quantization_config of a model whose named modules are stored natively."""
    counts: dict[QuantSpec, int] = {}
    for spec in specs.values():
        counts[spec] = counts.get(spec, 0) + 1
    usual = max(counts, key=lambda spec: counts[spec]) if counts else QuantSpec()
    return {
        "quant_method": NATIVE_METHOD,
        "version": NATIVE_VERSION,
        "spec": usual.to_dict(),
        "modules": {path: spec.to_dict() for path, spec in specs.items() if spec != usual},
        "quantized_modules": list(specs),
    }


def newer_than_known(settings: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of a version of the native format that this does not read."""
    version = settings.get("version", 0)
    return not isinstance(version, int) or version > NATIVE_VERSION


def native_specs(settings: Mapping[str, Any]) -> dict[str, QuantSpec]:
    """The inverse of ``native_config``.

    Raises:
        InputError: an entry that is missing or not of the right form.
    """
    try:
        usual = QuantSpec.from_dict(settings["spec"])
        special = {path: QuantSpec.from_dict(values) for path, values in settings.get("modules", {}).items()}
        return {str(path): special.get(path, usual) for path in settings["quantized_modules"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"config.json: quantization_config cannot be read: {error}") from error


def shape_of(path: str, module: nn.Module | ExpertPlace | None) -> torch.Size:
    """Rows and columns of the layer that stands for ``module``: (out, in), for an embedding (rows, width).

    For an expert its place is given.

    Raises:
        InputError: a module that holds no weight that could be quantised, or none.
    """
    if isinstance(module, ExpertPlace):
        return module.shape
    if isinstance(module, nn.Linear):
        return torch.Size((module.out_features, module.in_features))
    if module is not None and is_conv1d(module):
        return torch.Size(reversed(module.weight.shape))  # type: ignore[arg-type]
    if isinstance(module, nn.Embedding):
        return torch.Size((module.num_embeddings, module.embedding_dim))
    what = "no such module" if module is None else f"a {type(module).__name__}"
    raise InputError(f"'{path}' is quantised in the checkpoint, but the model has {what} there")


Found = Iterator[tuple[str, Callable[[], QuantizedTensor]]]


def stored_weights(
    checkpoint: Checkpoint, settings: Any, partial: PartialModel, modules: dict[str, nn.Module]
) -> Found:
    """The quantised weights of a checkpoint: module path in memory, and what reads the weight when called.

    Args:
        checkpoint: Quantised, see ``check_quantised``.
        settings: Its quantization_config.
        partial: The model of the checkpoint.
        modules: The model's modules by path, as they are before any is replaced.

    Raises:
        InputError: here or at reading: a tensor that is missing, broken or of another shape.
    """
    native = settings.get("quant_method") == NATIVE_METHOD
    return (_native if native else _bitsandbytes)(checkpoint, settings, partial, modules)


def _native(
    checkpoint: Checkpoint, settings: Mapping[str, Any], partial: PartialModel, modules: dict[str, nn.Module]
) -> Found:
    specs = native_specs(settings)
    names = partial.parameters_of(f"{stored}.weight" for stored in specs)
    for stored, spec in specs.items():
        path = names[f"{stored}.weight"].removesuffix(".weight")
        shape = shape_of(path, standing_at(modules, path))

        def read(stored: str = stored, spec: QuantSpec = spec, shape: torch.Size = shape) -> QuantizedTensor:
            entries = [checkpoint.tensors.get(f"{stored}.{name}") for name in TENSOR_NAMES]
            tensors = [None if entry is None else entry.read() for entry in entries]
            try:
                return as_quantized(tensors, spec, shape, partial.dtype)
            except (ValueError, TypeError, RuntimeError) as error:
                raise InputError(f"{checkpoint.folder}: '{stored}' cannot be read: {error}") from error

        yield path, read


def _bitsandbytes(
    checkpoint: Checkpoint, settings: Mapping[str, Any], partial: PartialModel, modules: dict[str, nn.Module]
) -> Found:
    del settings  # each tensor carries its own
    weights = [n for n in checkpoint.tensors if n.endswith(".weight") and is_bnb(n, checkpoint.tensors)]
    names = partial.parameters_of(weights)
    related: dict[str, list[str]] = {name: [name] for name in weights}
    for other in checkpoint.tensors:  # X.weight.absmax, X.SCB, ... belong to X.weight
        before, dot, _ = other.rpartition(".weight.")
        owner = f"{before}.weight" if dot else f"{other.rpartition('.')[0]}.weight"
        if other != owner and owner in related:
            related[owner].append(other)
    for name in weights:
        path = names[name].removesuffix(".weight")
        shape = shape_of(path, modules.get(path))

        def read(name: str = name, shape: torch.Size = shape) -> QuantizedTensor:
            tensors = {other: checkpoint.tensors[other].read() for other in related[name]}
            try:
                q = from_bnb(name, tensors, dtype=partial.dtype)
            except ValueError as error:
                raise InputError(f"{checkpoint.folder}: {error}") from error
            if q.shape != shape:
                raise InputError(
                    f"{checkpoint.folder}: {name} is {tuple(q.shape)}, the model expects {tuple(shape)}"
                )
            return q

        yield path, read


def standing_at(modules: Mapping[str, nn.Module], path: str) -> nn.Module | ExpertPlace | None:
    """The module at ``path``, or the place of the expert that it means."""
    return modules[path] if path in modules else place_of(modules, path)


def _layer(module: nn.Module | ExpertPlace, q: QuantizedTensor) -> nn.Module:
    """The quantised layer in place of ``module``, with its bias."""
    if isinstance(module, ExpertPlace):
        return QuantLinear.from_quantized(q, conv1d=module.in_out)
    if isinstance(module, nn.Embedding):
        return QuantEmbedding.from_quantized(
            q, padding_idx=module.padding_idx, embed_scale=_embed_scale(module)
        )
    bias = getattr(module, "bias", None)
    return QuantLinear.from_quantized(q, bias, conv1d=is_conv1d(module))


def _embed_scale(module: nn.Embedding) -> float | None:
    scale = getattr(module, "embed_scale", None)
    return float(scale) if isinstance(scale, (int, float, Tensor)) else None


def empty_layer(
    path: str, module: nn.Module | ExpertPlace | None, spec: QuantSpec, dtype: torch.dtype
) -> nn.Module:
    """The quantised layer that takes the place of ``module``, its tensors on the meta device.

    Raises:
        InputError: no module there, or one that holds no weight that could be quantised.
    """
    rows, columns = shape_of(path, module)
    if isinstance(module, nn.Embedding):
        layer: nn.Module = QuantEmbedding(
            rows,
            columns,
            spec,
            padding_idx=module.padding_idx,
            weight_dtype=dtype,
            embed_scale=_embed_scale(module),
            device="meta",
        )
    else:
        layer = QuantLinear(
            columns,
            rows,
            spec,
            bias=getattr(module, "bias", None) is not None,
            weight_dtype=dtype,
            conv1d=module.in_out
            if isinstance(module, ExpertPlace)
            else module is not None and is_conv1d(module),
            device="meta",
        )
    return layer.requires_grad_(False)
