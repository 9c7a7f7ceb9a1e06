"""Calibration for ``get_peft_model``: whatever ``LoftQConfig.calibration`` holds becomes second moments."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant import QuantizedTensor

from .base_weight import dense_weight, is_conv1d
from .blocks import NotSequential, find_blocks
from .calibration import calibrate
from .calibration_result import Calibration
from .config import LoftQConfig, LoraConfig
from .errors import InputError
from .inits import get, initialise
from .propagate import Solve, propagate
from .targets import pattern_value
from .texts import DEFAULT_WINDOW, load_texts
from .tokenizer import read_tokenizer

# Of all second moments together: above it they are found a block at a time and wait in a file.
_IN_MEMORY = 2 << 30


@contextmanager
def calibrated(model: nn.Module, config: LoraConfig, names: Sequence[str]) -> Iterator[None]:
    """Inside, ``config.loftq_config["calibration"]`` has the second moments that its method needs.

    Args:
        model: Not adapted yet. It runs over the texts and is left as it is; with ``propagate`` its weights
            become the targets to solve for.
        config: With ``init_lora_weights="loftq"``; as it was afterwards.
        names: Modules that will be quantised.

    Raises:
        InputError: texts without a tokenizer, that the model can't take, or that can't be read.
    """
    settings = LoftQConfig.from_dict(config.loftq_config)  # type: ignore[arg-type]
    given = settings.calibration
    if not get(settings.method).needs_hessian or given is None or _is_moments(given):
        yield
        return
    before = config.loftq_config
    with ExitStack() as stack:
        found = _obtain(model, settings, config, names, stack)
        for name in names:
            layer: Any = model.get_submodule(name)
            check_moment(found, name, layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer)
        config.loftq_config = {**before, "calibration": found}  # type: ignore[dict-item]
        try:
            yield
        finally:
            config.loftq_config = before


def check_moment(calibration: Any, name: str, base: nn.Module) -> None:
    """Refuse moments that were computed elsewhere and lack this layer, or are of another model.

    Texts that have yet to run through the model are let pass.

    Raises:
        ValueError: naming the layer.
    """
    if isinstance(base, nn.Embedding):
        return
    if isinstance(calibration, Calibration) and calibration.problem(name) is None:
        calibration.check(name, dense_weight(base))
    elif not isinstance(calibration, Calibration) and _is_moments(calibration) and name not in calibration:
        raise ValueError(f"calibration has no second moment for '{name}' ({type(base).__name__})")


def layer_moment(calibration: Any, name: str, base: nn.Module) -> tuple[Tensor | None, str]:
    """The second moment to solve a layer with, (in, in); or None and why there is none."""
    if isinstance(base, nn.Embedding):
        return None, "an embedding"
    if isinstance(calibration, Calibration):
        problem = calibration.problem(name)
        return (calibration.hessian(name), "") if problem is None else (None, problem)
    return calibration[name], ""


def _is_moments(given: Any) -> bool:
    """Second moments by layer, as opposed to one tokenised batch."""
    return isinstance(given, Mapping) and "input_ids" not in given


def _obtain(
    model: Any, settings: LoftQConfig, config: LoraConfig, names: Sequence[str], stack: ExitStack
) -> Calibration:
    given = settings.calibration
    if isinstance(given, (str, Path)) and Path(given).suffix == ".safetensors":
        return Calibration.load(given)
    tokenizer = settings.tokenizer if settings.tokenizer is not None else _tokenizer_of(model)
    window = settings.window if settings.window is not None else _longest_window(model, tokenizer)
    windows = load_texts(given, tokenizer, window=window, num_windows=settings.calibration_windows)
    try:
        texts = list(windows)
    except InputError as error:
        if tokenizer is None and "needs a tokenizer" in str(error):
            raise InputError(f"calibration: {error}; give LoftQConfig(tokenizer=...)") from error
        raise
    layers = [name for name in names if not isinstance(model.get_submodule(name), nn.Embedding)]
    if settings.propagate:
        return propagate(model, texts, layers, _solver(settings, config))
    save_to = None
    if _moment_bytes(model, layers) > _IN_MEMORY and _runs_by_blocks(model):
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="calibration-"))
        save_to = Path(folder) / "moments.safetensors"
    return calibrate(model, texts, layers, mode="auto" if save_to is None else "blocks", save_to=save_to)


def _solver(settings: LoftQConfig, config: LoraConfig) -> Solve:
    """Solves a layer as ``get_peft_model`` will."""

    def solve(name: str, weight: Tensor, hessian: Tensor) -> Tensor:
        bits = pattern_value(settings.bits_pattern, name, None, field_name="bits_pattern")
        done = initialise(
            weight,
            method=settings.method,
            rank=pattern_value(config.rank_pattern, name, config.r, field_name="rank_pattern"),
            spec=settings.spec(bits),
            iters=settings.loftq_iter,
            scales=settings.scales,
            svd=settings.svd,
            seed=settings.seed,
            damping=settings.damping,
            hessian=hessian,
            name=name,
        )
        assert isinstance(done.base, QuantizedTensor)
        return done.base.dequantize(torch.float32) + done.B @ done.A

    return solve


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer that lies beside the model's weights; None where there is none."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        return None
    try:
        return read_tokenizer(name, local_files_only=True)
    except InputError:
        return None


def _longest_window(model: Any, tokenizer: Any) -> int:
    """What tokenizer and model both take, at most 1024 tokens."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [getattr(text, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    return min([DEFAULT_WINDOW, *(limit for limit in limits if isinstance(limit, int))])


def _moment_bytes(model: nn.Module, names: Sequence[str]) -> int:
    """Bytes of the second moments, were no two shared."""
    total = 0
    for name in names:
        module: Any = model.get_submodule(name)
        width = module.weight.shape[0] if is_conv1d(module) else getattr(module, "in_features", 0)
        total += width * width * torch.float32.itemsize
    return total


def _runs_by_blocks(model: nn.Module) -> bool:
    try:
        find_blocks(model)
    except NotSequential:
        return False
    return True
