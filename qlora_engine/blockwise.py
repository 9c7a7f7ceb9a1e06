"""Run a model one block at a time over all its windows, so that one block's weights are in memory.

Between blocks the windows' hidden states wait, on the CPU or where a GPU has room for them. A caller may
replace the weights of a block before its output is computed, so that later blocks are measured behind what
the earlier ones have become.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qlora_engine.block_calls import BlockCall, CallRecorder
from qlora_engine.blocks import Blocks, make_batches, prepared
from qlora_engine.errors import InputError
from qlora_engine.observe import Group, Observer, Target, find_targets
from qlora_engine.partial_model import PartialModel

_SHARE_OF_FREE = 0.25  # the rest is for a block, its Hessians and what a batch computes
Inputs = Literal["original", "replaced", "both"]


@dataclass(frozen=True)
class LayerMoment:
    """What a layer was fed.

    Attributes:
        hessian: H = E[x x^T], float32 (in, in), or its diagonal (in,); layers with the same inputs share it.
        mean: E[x], float32 (in,).
        tokens: How many x.
        shrinkage: How far to shrink H before rounding in it (``SecondMoment.shrinkage``).
    """

    hessian: Tensor
    mean: Tensor
    tokens: int
    shrinkage: float


@dataclass
class BlockStep:
    """The layers of one block (or of what stands before or behind the blocks) and what they were fed.

    Attributes:
        path: Path of the block; "" for what stands around the blocks.
        index: Of the block from 0; -1 before, ``count`` behind.
        count: Blocks of the model.
        block: The live module, or the whole model where ``path`` is "". What the caller leaves in it is what
            replaced inputs are propagated through.
        targets: The layers by name.
        moments: By layer; those that were fed nothing are absent. Of the original inputs, or of the replaced
            ones with ``inputs="replaced"``.
        replaced: Of the inputs y through replaced blocks; only with ``inputs="both"``.
        cross: E[y x^T], rows of y and columns of the original x; only with ``inputs="both"``, and not where
            the two streams were routed to different experts.
    """

    path: str
    index: int
    count: int
    block: nn.Module
    targets: dict[str, Target]
    moments: dict[str, LayerMoment]
    replaced: dict[str, LayerMoment] = field(default_factory=dict)
    cross: dict[str, Tensor] = field(default_factory=dict)

    @property
    def hessians(self) -> dict[str, Tensor]:
        """H of ``moments`` by layer."""
        return {name: moment.hessian for name, moment in self.moments.items()}

    def replace(self, name: str, weight: Tensor) -> None:
        """Overwrite a layer's weight, in the orientation and dtype that it is stored in."""
        stored = self.targets[name].weight
        if stored is None or stored.shape != weight.shape:
            shape = None if stored is None else tuple(stored.shape)
            raise ValueError(f"{name}: weight {tuple(weight.shape)} for a layer of {shape}")
        with torch.no_grad():
            stored.copy_(weight)


def layer_moments(groups: Mapping[str, Group]) -> dict[str, LayerMoment]:
    """Moments by layer on the CPU, the tensors of a group once; uses the sums up."""
    made: dict[int, LayerMoment] = {}
    for group in _distinct(groups):
        moment = group.moment
        hessian = moment.mean(release=True)
        share = moment.shrinkage(hessian)
        made[id(group)] = LayerMoment(hessian.cpu(), moment.mean_input().cpu(), moment.tokens, share)
    return {name: made[id(group)] for name, group in groups.items()}


def _cross_moments(groups: Mapping[str, Group]) -> dict[str, Tensor]:
    made = {id(g): g.cross.mean(release=True).cpu() for g in _distinct(groups) if g.cross is not None}
    return {name: made[id(group)] for name, group in groups.items() if id(group) in made}


def _distinct(groups: Mapping[str, Group]) -> Iterable[Group]:
    return {id(group): group for group in groups.values()}.values()


def walk_blocks(
    source: nn.Module | PartialModel | str | Path,
    windows: Iterable[Tensor],
    targets: Iterable[str] | None = None,
    *,
    inputs: Inputs = "original",
    device: torch.device | str | None = None,
    batch_size: int = 4,
    dtype: torch.dtype = torch.float32,
    activation_dtype: torch.dtype | None = None,
    max_full_width: int | None = None,
    trust_remote_code: bool = False,
) -> Iterator[BlockStep]:
    """Second moments of layer inputs block by block, the caller free to replace weights on the way.

    Args:
        source: A model in memory, or a checkpoint (its folder, or opened as PartialModel), of which one block
            at a time is loaded.
        windows: Token ids, int64 (n,) each (``texts.load_texts``).
        targets: Layers, as in ``observe.find_targets``; None is every linear layer but the head.
        inputs: Whose second moments: "original", of the model as it is; "replaced", behind the earlier blocks
            as the caller left them; "both", with the moment between them.
        device: Where a block computes; None is where the model is, or the CPU.
        batch_size: Windows of equal length that run at once.
        dtype: Of weights loaded from a folder.
        activation_dtype: In which hidden states wait between blocks; None is the model's.
        max_full_width: Wider inputs keep only the diagonal of H.
        trust_remote_code: Let Python files of the folder run.

    Yields:
        A step for every block that has targets, in order, and before and behind them one for the targets that
        stand outside of the blocks, if there are any.

    Raises:
        NotSequential: this model cannot be run in this way.
        InputError: no such layer, a window that does not fit the model, inputs that are not finite.
    """
    if isinstance(source, (str, Path)):
        source = PartialModel(Path(source), dtype=dtype, trust_remote_code=trust_remote_code)
    partial = source if isinstance(source, PartialModel) else None
    model: Any = source.model if isinstance(source, PartialModel) else source
    if device is None:
        device = "cpu" if partial is not None else next(model.parameters()).device
    if inputs not in get_args(Inputs):
        raise ValueError(f"inputs must be one of {', '.join(get_args(Inputs))}, got {inputs!r}")
    walk = _Walk(Blocks(model, torch.device(device), partial), inputs, activation_dtype, max_full_width)
    names = None if targets is None else [partial.names.get(n, n) if partial else n for n in targets]
    with prepared(model):
        batches = list(make_batches(windows, batch_size, model))
        if not batches:
            raise InputError("no windows to run the model on")
        yield from walk.run(batches, find_targets(model, names))


@dataclass
class _Walk:
    blocks: Blocks
    inputs: Inputs
    activation_dtype: torch.dtype | None
    max_full_width: int | None
    _waiting: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def _observer(self, targets: Mapping[str, Target], **options: Any) -> Observer:
        return Observer(targets, max_full_width=self.max_full_width, **options)

    def _step(self, index: int, targets: dict[str, Target], observer: Observer) -> BlockStep:
        groups = observer.finish()
        inside = 0 <= index < len(self.blocks)
        path = self.blocks.prefix(index) if inside else ""
        block = self.blocks.layers[index] if inside else self.blocks.model
        return BlockStep(path, index, len(self.blocks), block, targets, layer_moments(groups))

    def _keep(self, hidden: Tensor) -> Tensor:
        return hidden.to(self._waiting, self.activation_dtype or hidden.dtype)

    def _choose_where_to_wait(self, start: Tensor, tokens: int) -> None:
        """Hidden states wait on the CPU, or on a GPU where two streams of them take little of its room."""
        if self.blocks.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.blocks.device)
            stream = start.element_size() * start.shape[-1] * tokens
            self._waiting = self.blocks.device if 2 * stream < _SHARE_OF_FREE * free else self._waiting

    def _enter(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        return hidden.to(self.blocks.device, dtype)

    @torch.no_grad()  # as a decorator it is off while the caller works between two steps
    def run(self, batches: list[Tensor], targets: dict[str, Target]) -> Iterator[BlockStep]:
        blocks, recorder = self.blocks, CallRecorder(self.blocks)
        within: list[dict[str, Target]] = [{} for _ in range(len(blocks))]
        around: dict[str, Target] = {}
        for name, target in targets.items():
            inner = name.startswith(f"{blocks.path}.")
            place = within[int(name[len(blocks.path) + 1 :].split(".")[0])] if inner else around
            place[name] = target
        with blocks.present(None, 0):
            observer = self._observer(around)
            calls: list[list[BlockCall]] = []
            original: list[Tensor] = []
            with observer:
                for ids in batches:
                    start, recorded = recorder.capture(ids, observer)
                    if not calls:
                        self._choose_where_to_wait(start, sum(map(Tensor.numel, batches)))
                    original.append(self._keep(start))
                    calls.append(recorded)
            compute_dtype = start.dtype
            before = {name: around[name] for name in around if name in observer.finish()}
            # Only "both" has two streams; "replaced" has one, and it is the drifted one.
            drifted = list(original) if self.inputs == "both" else original
            if before:
                yield self._step(-1, before, observer)
                if self.inputs != "original":
                    nobody = self._observer({})
                    drifted[:] = [self._keep(recorder.capture(ids, nobody)[0]) for ids in batches]
        last = max((i for i in range(len(blocks)) if within[i]), default=-1)
        behind = {name: target for name, target in around.items() if name not in before}
        end = len(blocks) if behind else last + 1
        for index in range(end):
            step_calls = [c[index] for c in calls]
            with blocks.present(index):
                yield from self._block(index, within[index], step_calls, original, drifted, compute_dtype)
        if behind:
            with blocks.present(None):
                yield self._finish(recorder, batches, behind, original, drifted, compute_dtype)

    def _block(
        self,
        index: int,
        targets: dict[str, Target],
        calls: list[BlockCall],
        original: list[Tensor],
        drifted: list[Tensor],
        dtype: torch.dtype,
    ) -> Iterator[BlockStep]:
        """One block: its step is yielded if it has targets; both streams are moved behind it in place."""
        block = self.blocks.layers[index]
        both = self.inputs == "both"
        first = self._observer(targets, record_tape=both)
        second = self._observer(targets, tape=first.tape)
        for n, call in enumerate(calls):
            with first:
                first.start()
                after = call(block, self._enter(original[n], dtype))
            if self.inputs != "replaced":
                original[n] = self._keep(after)  # in place: one copy of the stream is enough
            if both:
                with second:
                    second.start()
                    call(block, self._enter(drifted[n], dtype))
        first.start()
        if targets:
            step = self._step(index, targets, first)
            if both:
                groups = second.finish()
                step.cross, step.replaced = _cross_moments(groups), layer_moments(groups)
            yield step
        if self.inputs != "original":
            for n, call in enumerate(calls):
                drifted[n] = self._keep(call(block, self._enter(drifted[n], dtype)))

    def _finish(
        self,
        recorder: CallRecorder,
        batches: list[Tensor],
        targets: dict[str, Target],
        original: list[Tensor],
        drifted: list[Tensor],
        dtype: torch.dtype,
    ) -> BlockStep:
        both = self.inputs == "both"
        first = self._observer(targets, record_tape=both)
        second = self._observer(targets, tape=first.tape)
        for ids, x, y in zip(batches, original, drifted):
            with first:
                recorder.finish(ids, x.to(dtype), first)
            if both:
                with second:
                    recorder.finish(ids, y.to(dtype), second)
        step = self._step(len(self.blocks), targets, first)
        if both:
            groups = second.finish()
            step.cross, step.replaced = _cross_moments(groups), layer_moments(groups)
        return step
