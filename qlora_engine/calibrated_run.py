"""What ``loftq-init`` does before the first layer when it is given text or a budget: calibrate, share bits
out."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant import QuantSpec

from .allocate import Allocation, allocate, candidate_specs, layer_choices
from .calibration import calibrate
from .calibration_result import Calibration
from .errors import InputError
from .files import Lock, write_json
from .options import InitOptions
from .plan import Plan
from .propagate_run import Propagation
from .texts import DEFAULT_WINDOW, load_texts
from .tokenizer import read_tokenizer
from .workspace import RUN_FILE, Workspace

# Least error a bit, recipe-fast on two layers of MiniLM, output error on other text: at 2.13 bits uint2 .124,
# bof2 .128; at 2.25 bof2 and uint2 .121, int2 .122, nf2 .129; at 3.13 bof3 .0615, nf3 .0643, int3 .0658.
BUDGET_FORMATS = ("bof2", "uint2", "bof3", "bof4", "int8")
SENSITIVITY_WINDOWS = 4  # measured on few windows: only ratios between layers matter

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Source:
    """Where the inputs' second moments come from.

    Attributes:
        texts: File or folder of texts, or None.
        load: A calibration that was saved earlier, or None.
        save: Where to keep the calibration, or None.
        windows: Windows of text.
        window: Tokens of each; None: as many as tokenizer and model take, at most 1024.

    Raises:
        InputError: both texts and a saved calibration, or a count that is not positive.
    """

    texts: Path | None = None
    load: Path | None = None
    save: Path | None = None
    windows: int = 64
    window: int | None = None

    def __post_init__(self) -> None:
        if self.texts is not None and self.load is not None:
            raise InputError("--calibration and --load-calibration: give one of them")
        if self.save is not None and self.texts is None:
            raise InputError("--save-calibration needs --calibration TEXTS")
        if self.windows < 1:
            raise InputError(f"--calibration-windows {self.windows}; it must be at least 1")

    @property
    def given(self) -> bool:
        """Whether there is anything to calibrate with."""
        return self.texts is not None or self.load is not None


def cache_path(out: Path) -> Path:
    """Where the calibration of an unfinished run for ``out`` lies."""
    return out.parent / f".{out.name}.calibration.safetensors"


@contextmanager
def alone(source: Source, out: Path) -> Iterator[None]:
    """Keep other processes from the calibration of ``out``, which is made before its workspace is opened.

    Raises:
        InputError: another process works on ``out``, or on the file that the calibration is kept in.
        OSError: the lock cannot be made.
    """
    if not source.given:
        yield
        return
    Workspace.tidy(out)  # refuses an ``out`` whose layers are being written
    with ExitStack() as stack:
        for path in {cache_path(out), source.save or cache_path(out)}:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = Lock(path.with_name(path.name + ".lock"), Path(os.path.realpath(out)))
            stack.callback(lock.release, remove=True)
        yield


def obtain(
    source: Source,
    plan: Plan,
    out: Path,
    device: torch.device,
    *,
    sensitivities: bool = False,
    progress: Progress | None = None,
) -> tuple[Calibration, dict[str, Any]]:
    """The calibration, made or read, and what identifies it, JSON-able.

    A calibration that an interrupted run made from the same model and texts is used again.

    Args:
        source: Texts or a file.
        plan: Names the layers.
        out: The run's output; an unfinished run's calibration lies beside it.
        device: To compute on.
        sensitivities: Also how much the loss minds each layer's output.
        progress: Called with steps done, steps in all and what was done.

    Raises:
        InputError: unusable texts, another model's calibration, or a file that is none.
        OSError: the calibration cannot be written.
    """
    if source.load is not None:
        if not source.load.is_file():
            raise InputError(f"--load-calibration: no such file: {source.load}")
        return Calibration.load(source.load), {"file": _digest(source.load)}
    identity = texts_identity(source, device) | {"sensitivities": sensitivities}
    path = source.save or cache_path(out)
    beside = path.with_name(path.name + ".json")
    described = json.loads(json.dumps({**identity, "input": plan.checkpoint.identity()}))
    if not (path.is_file() and beside.is_file() and _read(beside) == described):
        path.parent.mkdir(parents=True, exist_ok=True)
        calibrate(
            plan.checkpoint.folder,
            read_windows(source, plan),
            [
                layer.path
                for layer in plan.layers
                if layer.module.kind != "embedding" and (layer.rank or not layer.stack)
            ],
            device=device,
            max_full_width=widest_full_moment(memory_of(device)),
            sensitivity_windows=SENSITIVITY_WINDOWS if sensitivities else 0,
            save_to=path,
            progress=progress,
            trust_remote_code=plan.options.trust_remote_code,
        )
        write_json(beside, described)
    return Calibration.load(path), identity


def texts_identity(source: Source, device: torch.device) -> dict[str, Any]:
    """What identifies the texts and where they were run, JSON-able.

    Raises:
        InputError: they are not there.
    """
    assert source.texts is not None
    if not source.texts.exists():
        raise InputError(f"--calibration: no such file or folder: {source.texts}")
    return {
        "texts": _digest(source.texts),
        "windows": source.windows,
        "window": source.window,
        "device": device.type,
    }


def read_windows(source: Source, plan: Plan) -> Iterable[Tensor]:
    """The texts as token ids.

    Raises:
        InputError: unusable texts, or a model without a tokenizer.
    """
    assert source.texts is not None
    return load_texts(
        source.texts, _tokenizer(plan), window=_window(source, plan), num_windows=source.windows
    )


def propagation(source: Source, plan: Plan, device: torch.device) -> Propagation:
    """The texts of ``source``, to be sent through the layers while they are solved."""
    return Propagation(
        lambda: list(read_windows(source, plan)), max_full_width=widest_full_moment(memory_of(device))
    )


def forget(source: Source, out: Path) -> None:
    """Remove the calibration of a run that is done, unless it was asked to be kept; not of an unfinished
    one."""
    unfinished = (Workspace.folder_for(Path(os.path.realpath(out))) / RUN_FILE).exists()
    if source.texts is not None and not unfinished:
        path = source.save or cache_path(out)
        path.with_name(path.name + ".json").unlink(missing_ok=True)
        if source.save is None:
            path.unlink(missing_ok=True)


def share_out(
    plan: Plan, budget: float, calibration: Calibration | None, device: torch.device
) -> tuple[InitOptions, Allocation, tuple[str, ...]]:
    """Options with a width, block size and double quantisation for every layer, within ``budget`` bits a
    weight.

    Returns:
        The options, what was chosen, and what the report should say about it, a sentence each.

    Raises:
        InputError: a budget that no choice of formats meets.
    """
    specs = candidate_specs(BUDGET_FORMATS, (32, 64, 128), (True,))
    specs += candidate_specs(BUDGET_FORMATS, (64,), (False,))

    def weights() -> Iterator[tuple[str, Tensor]]:
        for layer in plan.layers:
            weight = layer.entry.read().to(device)
            yield layer.path, weight.T.contiguous() if layer.module.kind == "conv1d" else weight

    known: dict[str, Tensor] = {}
    if calibration is not None:
        minded = ((layer.path, calibration.sensitivity(layer.path)) for layer in plan.layers)
        known = {path: values for path, values in minded if values is not None}
    # The calibration reads one H at a time: that of the layer being measured.
    groups = {layer.path: layer.stack for layer in plan.layers if layer.stack}  # one width for a stack
    choices = layer_choices(weights(), specs, calibration, known, groups=groups)
    with _no_c_output():
        allocation = allocate(choices, budget)
    notes = [
        f"budget of {budget:g} bits a weight: {allocation.bits_per_weight:.4f} are taken, scales included"
    ]
    if estimated := [choice.name for choice in choices if choice.estimated]:
        notes.append(
            f"{len(estimated)} layers that calibration did not reach, e.g. '{estimated[0]}', share in the "
            "budget as layers of their shape do"
        )
    patterns = {f"^{re.escape(path)}$": _width(spec) for path, spec in allocation.specs.items()}
    return replace(plan.options, bits_pattern=patterns), allocation, tuple(notes)


@contextmanager
def _no_c_output() -> Iterator[None]:
    """Drop what compiled code prints on standard output: HiGHS has stray lines, and ours may be JSON."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what is still in C's buffer
        os.dup2(kept, 1)
        os.close(nowhere)
        os.close(kept)


def _width(spec: QuantSpec) -> str:
    """A spec as ``options.parse_width`` reads it."""
    return f"{spec.format}/{spec.block_size}/{'double' if spec.double_quant else 'plain'}"


def widest_full_moment(memory: int) -> int:
    """Inputs up to which a whole second moment can be solved in with so many bytes of memory.

    Measured: solving holds 9 float32 matrices of its size at the peak (width 4096, 256 outputs), besides the
    weight's own workspace; it may take up to half of what there is.
    """
    return int((memory / 2 / (9 * 4)) ** 0.5)


def memory_of(device: torch.device) -> int:
    """Bytes that the device has in all: the same at every run."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _window(source: Source, plan: Plan) -> int | None:
    """As asked for, or what tokenizer and model both take, at most 1024."""
    config = plan.checkpoint.config
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    if source.window is not None or not isinstance(longest, int):
        return source.window
    by_tokenizer = getattr(_tokenizer(plan), "model_max_length", None) or DEFAULT_WINDOW
    return min(DEFAULT_WINDOW, longest, by_tokenizer)


def _tokenizer(plan: Plan) -> Any:
    return read_tokenizer(plan.checkpoint.folder, trust_remote_code=plan.options.trust_remote_code)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
