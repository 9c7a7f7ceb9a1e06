"""A quantised model spread over the processes with FSDP2, read so that no process ever holds all of it.

The model is built without weights and gets its adapter; then one decoder layer after the other is read from
the checkpoint and sharded by ``fully_shard``, and what lies outside the layers last. A process holds its
shards and at most one layer more. The packed weights are uint8 Parameters, sharded like any other.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_engine.adapter_io import write_adapter
from qlora_engine.adapter_state import adapter_keys, get_peft_model_state_dict, load_peft_weights
from qlora_engine.checkpoint import Checkpoint
from qlora_engine.distributed import gather, world
from qlora_engine.errors import InputError
from qlora_engine.expert_stack import ExpertPlace, put_layer, settle_experts
from qlora_engine.fingerprint import Fingerprint, module_digest
from qlora_engine.loading import (
    check_quantised,
    empty_layer,
    native_config,
    not_quantised,
    read_generation_config,
    standing_at,
    stored_weights,
)
from qlora_engine.lora_layer import LoraLayer
from qlora_engine.partial_model import PartialModel
from qlora_engine.peft_layout import check_stacks, release_of_stacks
from qlora_engine.safetensors_io import DenseTensor
from quant.linear import QuantizedModule

from .host import embedding_to_host
from .recompute import decoder_layers

_FINGERPRINT = "_fingerprint_of_shards"  # a process cannot hash weights of which it has a part


def load_sharded(
    folder: Path,
    config: Any,
    adapter: Path | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    embedding_on_host: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[nn.Module], None] | None = None,
) -> Any:
    """A PeftModel around the quantised checkpoint in ``folder``, sharded over all processes.

    Args:
        folder: What loftq-init wrote, packed.
        config: The adapter's LoraConfig.
        adapter: Folder of the adapter to go on from; None: a new one, drawn from ``seed``.
        dtype: Of what is not quantised.
        device: This process's.
        seed: Of a new adapter; the same in all processes.
        embedding_on_host: Every process keeps the input embedding's whole table in its host's memory.
        trust_remote_code: Let Python files of the folder run.
        progress: Called with the model after each part has been read and sharded.

    Raises:
        InputError: a dense checkpoint, one that cannot be read, a model without known decoder layers, or
            modules that would train in full.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from qlora_engine import get_peft_model

    checkpoint = Checkpoint.open(folder)
    settings = checkpoint.config.get("quantization_config")
    if settings is None:
        raise InputError(f"{folder} is dense; a model that is to be sharded must be written by loftq-init")
    check_quantised(folder, settings)
    if config.modules_to_save or config.trainable_token_indices:
        raise InputError(
            "--shard reads and saves LoRA factors alone; this adapter also has modules_to_save or "
            "trainable_token_indices: leave --shard out (a copy of the model on each GPU), or take another"
        )
    partial = PartialModel(folder, dtype=dtype, trust_remote_code=trust_remote_code, quantised=True)
    base = partial.model
    modules = dict(base.named_modules())
    readers = dict(stored_weights(checkpoint, settings, partial, modules))
    rest = not_quantised(base, readers)
    specs = {path: read().spec for path, read in readers.items()}
    layers = decoder_layers(base)
    if not layers:
        raise InputError(f"{folder}: no decoder layers that can be sharded are known of this model")
    for path, spec in specs.items():
        there = standing_at(modules, path)
        modules[path] = empty_layer(path, there, spec, dtype)
        put_layer(base, path, modules[path], there if isinstance(there, ExpertPlace) else None)
    settle_experts(base)
    base.config.quantization_config = native_config(specs)
    read_generation_config(base, folder)
    partial.homes.update(modules)  # the adapter wraps some of them
    places = {id(module): path for path, module in modules.items()}
    in_layers = [places[id(layer)] + "." for layer in layers]

    config.base_model_name_or_path = base.name_or_path or str(folder)
    release = None if adapter is None else release_of_stacks(config)
    model = get_peft_model(base, config)
    check_stacks(model, "default", release)
    _fill_adapter(model, adapter, seed)
    made_for = _fingerprint(adapter)
    digests: dict[str, str] = {}
    here = world()
    turns = {path: number % here.size for number, path in enumerate(readers)}  # which process hashes it
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    moved: set[str] = set()

    def fill(mine: Callable[[str], bool]) -> None:
        for path in filter(mine, readers):
            q = readers[path]()
            if turns[path] == here.rank:
                digests[path] = module_digest(q)
            layer = modules[path]
            assert isinstance(layer, QuantizedModule)
            layer.set_quantized(q)
        names = [name for name in rest if mine(name)]
        partial.load(names)
        moved.update(names)

    for layer, prefix in zip(layers, in_layers, strict=True):
        fill(lambda name, prefix=prefix: name.startswith(prefix))  # type: ignore[misc]
        fully_shard(layer, mesh=mesh)
        if progress is not None:
            progress(model)
    fill(lambda name: name not in moved and not name.startswith(tuple(in_layers)))
    if embedding_on_host:
        embedding_to_host(base)
    fully_shard(base, mesh=mesh)
    for name, buffer in base.named_buffers():
        holder, _, leaf = name.rpartition(".")
        base.get_submodule(holder)._buffers[leaf] = buffer.to(device)
    for part in gather(digests):
        digests.update(part)
    known = {} if made_for is None else made_for.digests
    if other := [path for path, digest in digests.items() if known.get(path, digest) != digest]:
        warnings.warn(
            f"{adapter} belongs to another quantised base: {len(other)} of {len(digests)} weights differ, "
            f"the first is {other[0]}",
            stacklevel=2,
        )
    setattr(base, _FINGERPRINT, Fingerprint(specs, digests, str(dtype).removeprefix("torch.")))
    missing = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    assert not missing, missing
    if progress is not None:
        progress(model)
    model.eval()
    return model


def _fill_adapter(model: Any, adapter: Path | None, seed: int) -> None:
    """Give the factors their values: from ``adapter``, or A uniform as in nn.Linear and B zero."""
    if adapter is not None:
        weights = load_peft_weights(adapter, device="cpu")
        keys = adapter_keys(model, "default")
        if strange := sorted(name for name in weights if "lora_" in name and name not in keys):
            raise InputError(f"{adapter}: this model has no place for {strange[0]}")
        model.load_state_dict(
            {keys[name]: tensor.float() for name, tensor in weights.items() if name in keys},
            strict=False,
            assign=True,
        )
    else:
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if not isinstance(module, LoraLayer):
                continue
            for A, B in zip(module.lora_A.values(), module.lora_B.values(), strict=True):
                rank, columns = A.weight.shape
                bound = 1.0 / math.sqrt(columns)
                values = (torch.rand(rank, columns, generator=generator) * 2 - 1) * bound
                A.weight = nn.Parameter(values)
                B.weight = nn.Parameter(torch.zeros(B.weight.shape))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name and parameter.is_meta:
            raise InputError(f"{adapter}: no weights for {name}")


def _fingerprint(adapter: Path | None) -> Fingerprint | None:
    found = None if adapter is None else Fingerprint.read(adapter)
    return None if found is None or found.dense else found


def whole(value: Any) -> Any:
    """Sharded tensors in ``value`` (dicts, lists) put together on the CPU; all processes must call it."""
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return value


def adapter_weights(model: Any) -> dict[str, Tensor]:
    """The adapter as a file holds it, put together on the CPU; all processes must call it."""
    return {key: whole(tensor) for key, tensor in get_peft_model_state_dict(model).items()}


def save_adapter(model: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the adapter into ``folder``; one process does it.

    Args:
        model: A PeftModel.
        folder: PEFT's files and the fingerprint of the base go there.
        weights: Of a sharded model: ``adapter_weights``, called by all processes before.
    """
    if weights is None:
        model.save_pretrained(folder)
        return
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    tensors = [DenseTensor(name, weights[name].contiguous()) for name in sorted(weights)]
    write_adapter(folder, tensors, config, sharded_fingerprint(model.get_base_model()))


def sharded_fingerprint(base: Any) -> Fingerprint | None:
    """Of the base that ``load_sharded`` made; None for another."""
    return getattr(base, _FINGERPRINT, None)


def put(target: Tensor, values: Tensor) -> None:
    """Copy ``values``, whole in every process, into a parameter, sharded or not."""
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        target.copy_(_like(target, values) if isinstance(target, DTensor) else values)


def _like(target: Any, values: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    part: Tensor = distribute_tensor(
        values.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )
    return part


def put_adapter(model: Any, weights: dict[str, Tensor]) -> None:
    """Set the adapter of a sharded model to ``weights``, keys as in a file."""
    for key, parameter in get_peft_model_state_dict(model).items():
        put(parameter, weights[key])


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with its tensors put together; all processes must call it."""
    state: dict[str, Any] = whole(optimizer.state_dict())
    return state


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of ``optimizer_state``, for however many processes there are now."""
    from torch.distributed.tensor import DTensor

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shared: dict[int, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        parameter = parameters[index]
        shared[index] = {
            key: _like(parameter, value)
            if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape
            else value
            for key, value in entries.items()
        }
    optimizer.load_state_dict({"state": shared, "param_groups": state["param_groups"]})
