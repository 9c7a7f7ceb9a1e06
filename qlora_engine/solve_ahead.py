"""Layers solved together, if asked: several of one shape at once, the next ones read and uploaded meanwhile.

A small matrix does not fill a GPU, and a GPU waits for a disk that is not read ahead. So layers are taken in
windows of half a gigabyte: within a window, those of one shape are solved together; while a window is solved,
a thread reads the next into pinned memory and uploads it on a stream of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from .layer_plan import LayerPlan
from .plan import Plan
from .solve import SolvedLayer, may_share, solve_group, solve_layer

# Of device memory a weight of a window, at most: it and the next one in 16 bits, and of a group that is being
# solved float32 copies, workspaces, Krylov bases, and all iterates.
_BYTES_A_WEIGHT = 32
_MOST_WEIGHTS = 1 << 28  # 537 MB on disk: twice as much in pinned memory, and lost when a run is killed


class _Loaded(NamedTuple):
    weight: Tensor
    ready: torch.cuda.Event | None


def solve_ahead(
    plan: Plan, layers: Sequence[LayerPlan], device: torch.device, *, weights: int | None = None
) -> Iterator[SolvedLayer]:
    """``solve_layer`` for all layers, in their order, without calibration.

    Args:
        plan: The run's.
        layers: To solve.
        device: To compute on.
        weights: In a window, at least one layer; None: as many as fit the device's free memory, up to 2^28.

    Raises:
        InputError: as ``solve_layer``.
    """
    windows = list(_windows(layers, _room(device) if weights is None else weights))
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def load(window: Sequence[LayerPlan]) -> list[_Loaded]:
        return [_load(layer, device, stream) for layer in window]

    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        upcoming = reader.submit(load, windows[0]) if windows else None
        for number, window in enumerate(windows):
            assert upcoming is not None
            loaded = upcoming.result()
            upcoming = reader.submit(load, windows[number + 1]) if number + 1 < len(windows) else None
            yield from _solve_window(plan, window, loaded, device)


def _room(device: torch.device) -> int:
    if device.type != "cuda":
        return _MOST_WEIGHTS
    free, _ = torch.cuda.mem_get_info(device)
    return min(_MOST_WEIGHTS, free // _BYTES_A_WEIGHT)


def _windows(layers: Sequence[LayerPlan], weights: int) -> Iterator[list[LayerPlan]]:
    window: list[LayerPlan] = []
    for layer in layers:
        if window and sum(one.numel for one in window) + layer.numel > weights:
            yield window
            window = []
        window.append(layer)
    if window:
        yield window


def _load(layer: LayerPlan, device: torch.device, stream: torch.cuda.Stream | None) -> _Loaded:
    weight = layer.entry.read()
    if stream is None:
        return _Loaded(weight, None)
    pinned = weight.pin_memory()  # kept by the allocator until the copy has read it
    with torch.cuda.device(device), torch.cuda.stream(stream):
        uploaded = pinned.to(device, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(stream)
    return _Loaded(uploaded, ready)


def _solve_window(
    plan: Plan, window: Sequence[LayerPlan], loaded: list[_Loaded], device: torch.device
) -> Iterator[SolvedLayer]:
    for weight, ready in loaded:
        if ready is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(ready)
            weight.record_stream(stream)
    groups: dict[object, list[int]] = {}
    for number, layer in enumerate(window):
        key = may_share(plan, layer)
        groups.setdefault(("alone", number) if key is None else key, []).append(number)
    solved: dict[int, SolvedLayer] = {}
    for numbers in groups.values():
        members = [window[i] for i in numbers]
        weights = [loaded[i].weight for i in numbers]
        if len(members) == 1:
            results = [solve_layer(plan, members[0], weights[0], device)]
        else:
            results = solve_group(plan, members, weights, device)
        solved.update(zip(numbers, results, strict=True))
    for number in range(len(window)):
        yield solved.pop(number)
